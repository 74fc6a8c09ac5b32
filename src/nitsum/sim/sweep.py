"""Several systems under rising load: where each stops keeping its promises, and by how much.

A load is a multiple of the workload's own rate. Every system sees the same arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from nitsum.metrics.report import Report, TierReport
from nitsum.metrics.targets import Targets
from nitsum.sim.run import Options, SimResult, simulate
from nitsum.sim.system import System
from nitsum.workload.generate import generate
from nitsum.workload.spec import MixSpec, scaled

SUSTAINED_SHARE = 0.9
"""A load is sustained for a tier while this share of its requests meets all its targets."""
STRICT_SHARE = 0.99
Progress = Callable[[str], None]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One system under one load."""

    system: str
    load: float
    report: Report
    busy_share: float
    """Mean over the ranks."""
    arena_mean_share: float
    arena_max_share: float
    speedup: float


def sweep(
    systems: Sequence[System],
    mix: MixSpec,
    loads: Iterable[float],
    targets: Targets,
    *,
    options: Options | None = None,
    warmup_s: float = 0.0,
    small_samples: bool = False,
    note: Progress | None = None,
) -> list[Point]:
    """Every system under every load, all on identical arrivals."""
    points: list[Point] = []
    for load in loads:
        for system in systems:
            result = simulate(system, generate(scaled(mix, load)), targets=targets, options=options)
            point = _point(result, load, targets, warmup_s, small_samples)
            points.append(point)
            if note is not None:
                note(line_of(point))
    return points


def _point(
    result: SimResult, load: float, targets: Targets, warmup_s: float, small_samples: bool
) -> Point:
    return Point(
        system=result.system.name,
        load=load,
        report=result.report(targets, warmup_s=warmup_s, small_samples=small_samples),
        busy_share=sum(result.busy_share) / len(result.busy_share),
        arena_mean_share=result.arena_mean_share,
        arena_max_share=result.arena_max_share,
        speedup=result.speedup,
    )


def line_of(point: Point) -> str:
    """One line of text."""
    tiers = ", ".join(f"{t.tier} {t.attainment or 0:.1%}" for t in point.report.tiers)
    return (
        f"load {point.load:g}, {point.system}: goodput {point.report.goodput_per_s or 0:.3f}/s "
        f"({tiers}), arena {point.arena_mean_share:.0%}, busy {point.busy_share:.0%}, "
        f"{point.speedup:.0f}x real time"
    )


# --- what the curves say --------------------------------------------------------------------------


def curve(points: Iterable[Point], system: str) -> list[Point]:
    """One system's points by rising load."""
    return sorted((p for p in points if p.system == system), key=lambda point: point.load)


def tier_of(point: Point, tier: str) -> TierReport | None:
    return next((found for found in point.report.tiers if found.tier == tier), None)


def sustained_load(
    points: Iterable[Point], system: str, tier: str, share: float = SUSTAINED_SHARE
) -> float | None:
    """The highest load up to which `share` of the tier's requests meet their targets.

    Linear between the two loads where it is lost. None when it is not even met at the lowest;
    the highest load that was tried when it is never lost.
    """
    before: tuple[float, float] | None = None
    for point in curve(points, system):
        found = tier_of(point, tier)
        reached = 0.0 if found is None or found.attainment is None else found.attainment
        if reached < share:
            if before is None:
                return None
            load, height = before
            return load + (point.load - load) * (height - share) / (height - reached)
        before = point.load, reached
    return None if before is None else before[0]


def peak_goodput(points: Iterable[Point], system: str) -> float:
    """The most requests per second within all targets, over all loads."""
    return max((p.report.goodput_per_s or 0.0 for p in curve(points, system)), default=0.0)


def figures(points: Sequence[Point], ours: str, theirs: Sequence[str]) -> dict[str, float]:
    """What the sweep is for, by name; ratios are ours over theirs, above 1 is better.

    `priority_attainment_load_ratio` is the one over whichever of theirs sustains the most, and
    `chain_p99_ratio` the least of all.
    """
    found = {f"{word(name)}_{k}": v for name in (ours, *theirs) for k, v in _own(points, name)}
    load_ratios: list[float] = []
    for name, ending in zip(theirs, _endings(theirs), strict=True):
        pair = _pair(points, ours, name)
        found.update({f"{figure}_{ending}": value for figure, value in pair.items()})
        if "priority_attainment_load_ratio" in pair:
            load_ratios.append(pair["priority_attainment_load_ratio"])
    if theirs and len(load_ratios) == len(theirs):
        found["priority_attainment_load_ratio"] = min(load_ratios)
    of_chains = [value for name, value in found.items() if name.startswith("chain_p99_ratio")]
    return found | ({"chain_p99_ratio": min(of_chains)} if of_chains else {})


def _endings(names: Sequence[str]) -> list[str]:
    """What tells systems apart in a figure's name: the policy where that is enough."""
    policies = [name.rpartition(" ")[2] for name in names]
    return [word(name) for name in (policies if len(set(policies)) == len(names) else names)]


def word(name: str) -> str:
    """A system's name as part of a figure's."""
    return "".join(c if c.isalnum() else "_" for c in name).lower()


def _own(points: Sequence[Point], system: str) -> Iterable[tuple[str, float]]:
    for share in (SUSTAINED_SHARE, STRICT_SHARE):
        load = sustained_load(points, system, "priority", share)
        if load is not None:
            yield f"priority_load_at_{share * 100:.0f}pct", load
    yield "peak_goodput_requests_per_s", peak_goodput(points, system)


def _pair(points: Sequence[Point], ours: str, theirs: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for share, name in (
        (SUSTAINED_SHARE, "priority_attainment_load_ratio"),
        (STRICT_SHARE, "priority_strict_attainment_load_ratio"),
    ):
        loads = [sustained_load(points, system, "priority", share) for system in (ours, theirs)]
        if loads[0] is not None and loads[1]:
            found[name] = loads[0] / loads[1]
    peaks = peak_goodput(points, ours), peak_goodput(points, theirs)
    if peaks[1]:
        found["goodput_ratio"] = peaks[0] / peaks[1]
    for mine, other in zip(curve(points, ours), curve(points, theirs), strict=True):
        found.update(_at_load(mine, other))
    return found


def _at_load(mine: Point, other: Point) -> dict[str, float]:
    found: dict[str, float] = {}
    load = f"{mine.load:g}".replace(".", "p")
    goodputs = mine.report.goodput_per_s, other.report.goodput_per_s
    if goodputs[0] is not None and goodputs[1]:
        found[f"goodput_ratio_at_{load}"] = goodputs[0] / goodputs[1]
    chains = mine.report.chains.latency_s, other.report.chains.latency_s
    if chains[0].p99 and chains[1].p99:
        found[f"chain_p99_ratio_at_{load}"] = chains[1].p99 / chains[0].p99
    return found
