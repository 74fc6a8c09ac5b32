"""Several systems under rising load: where each stops keeping its promises, and by how much.

A load is a multiple of the workload's own rate. Every system sees the same arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from nitsum.metrics.report import Report, TierReport, build_report
from nitsum.metrics.targets import Targets
from nitsum.sim.run import Options, SimResult, simulate
from nitsum.sim.system import System
from nitsum.workload.generate import generate
from nitsum.workload.spec import MixSpec, scaled

SUSTAINED_SHARE = 0.9
"""A load is sustained for a tier while this share of its requests meets all its targets."""
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
    report = build_report(
        result.recorder, targets=targets, warmup_s=warmup_s, small_samples=small_samples
    )
    return Point(
        system=result.system.name,
        load=load,
        report=report,
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


def figures(points: Sequence[Point], ours: str, theirs: str) -> dict[str, float]:
    """What the sweep is for; ratios are ours over theirs, above 1 is better."""
    found: dict[str, float] = {}
    for name, system in (("ours", ours), ("theirs", theirs)):
        load = sustained_load(points, system, "priority")
        if load is not None:
            found[f"{name}_priority_sustained_load"] = load
        found[f"{name}_peak_goodput_requests_per_s"] = peak_goodput(points, system)
    mine, other = (found.get(f"{name}_priority_sustained_load") for name in ("ours", "theirs"))
    if mine and other:
        found["priority_attainment_load_ratio"] = mine / other
    if found["theirs_peak_goodput_requests_per_s"]:
        peaks = (found[f"{name}_peak_goodput_requests_per_s"] for name in ("ours", "theirs"))
        found["goodput_ratio"] = next(peaks) / next(peaks)
    found.update(_at_each_load(points, ours, theirs))
    return found


def _at_each_load(points: Sequence[Point], ours: str, theirs: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for mine, other in zip(curve(points, ours), curve(points, theirs), strict=True):
        word = f"{mine.load:g}".replace(".", "p")
        goodputs = mine.report.goodput_per_s, other.report.goodput_per_s
        if goodputs[0] is not None and goodputs[1]:
            found[f"goodput_ratio_at_load_{word}"] = goodputs[0] / goodputs[1]
        chains = mine.report.chains.latency_s, other.report.chains.latency_s
        if chains[0].p99 and chains[1].p99:
            found[f"chain_p99_ratio_at_load_{word}"] = chains[1].p99 / chains[0].p99
    return found
