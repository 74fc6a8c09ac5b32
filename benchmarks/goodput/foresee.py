"""Where the knees are: every side under rising load in the calibrated simulator.

    saturation   the fastest static layout, first come first served, with always more waiting
    best         for every policy, the layout and the load with the most requests in time, of loads
                 up to saturation: beyond, whoever may choose whom to serve in time has more to
                 choose from, and goodput rises again
    saturated    for every policy, the layout that is best at 1.5 times saturation
    shifting     the same mix in turns, at the load at which a static layout is best
    alone        the widest layout, serving the priority requests of those loads and nothing else
    capacity     the highest load whose priority requests alone it serves in time, 99% of them

Every run is kept in a folder, so that what was broken off goes on; code that has changed makes them
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from zlib import crc32

import msgspec

from benchmarks.goodput.basis import steps_digest
from benchmarks.goodput.points import SATURATED, Mixes, Point, Run, Side, save
from nitsum.config import Policy
from nitsum.errors import ConfigError
from nitsum.metrics.figures import figures
from nitsum.metrics.records import Recorder
from nitsum.metrics.targets import Targets
from nitsum.plan import parse_plan, read_plans
from nitsum.sim.run import Options, SimResult, simulate
from nitsum.sim.system import Site, System, build_system, static_system
from nitsum.workload.generate import generate
from nitsum.workload.spec import MixSpec, scaled

POLICIES: tuple[Policy, ...] = ("fcfs", "priority", "nitsum")
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Loads, of saturation."""
SHIFTING_SHARES = (0.5, 0.6, 0.7)
"""With the last one its busiest phase, at one and a half times the mean, is saturated."""
ALONE_SHARES = (0.5, 0.75, 1.0, 1.25, SATURATED, 2.0, 2.5, 3.0, 4.0)
IN_TIME = 0.99
_ANSWERED = 0.8
"""A layout that answers less than this share of what arrives is saturated."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Foresight:
    """Simulates sides of one site, each run once."""

    site: Site
    targets: Targets
    mixes: dict[Mixes, MixSpec]
    options: Options
    warmup_s: float
    folder: Path
    code: str
    """Which code simulates; what another one made is not taken."""
    note: Note

    def run(self, side: Side, mix: Mixes, load: float) -> Run:
        path = self._kept(side, mix, load)
        if path.is_file():
            return msgspec.json.decode(path.read_bytes(), type=Run)
        items = generate(scaled(self.mixes[mix], load))
        result = simulate(self._system(side), items, targets=self.targets, options=self.options)
        run = Run(side=side.name, mix=mix, load=load, figures=self._figures(result))
        if "busy_share" not in run.figures:
            raise _too_short(run)
        save(run, path)
        self.note(line_of(run))
        return run

    def _kept(self, side: Side, mix: Mixes, load: float) -> Path:
        """Named by all that a run depends on."""
        site, steps = replace(self.site, cost=None), steps_digest(self.site.cost)
        given = site, steps, self.targets, self.mixes[mix], self.options, self.warmup_s
        rest = repr((self.code, given))
        name = f"{mix}_{side.name}_{load:.3f}_{crc32(rest.encode()):08x}".replace(" ", "_")
        return self.folder / f"{name}.json"

    def _system(self, side: Side) -> System:
        num_ranks = self.site.num_ranks
        if not side.adaptive:
            return static_system(self.site, parse_plan(side.plans[0], num_ranks), side.policy)
        plans = read_plans(list(side.plans), num_ranks)
        min_tp = side.min_tp(num_ranks)
        return replace(
            build_system(self.site, side.name, plans, side.policy, min_tp=min_tp), steers=True
        )

    def _figures(self, result: SimResult) -> dict[str, float]:
        report = result.report(self.targets, warmup_s=self.warmup_s, small_samples=True)
        return figures(report) | {
            "answered_per_s": answered_per_s(result.recorder, self.warmup_s),
            "num_switches": float(len(result.reports)),
        }


def answered_per_s(run: Recorder, warmup_s: float) -> float:
    """Answers that ended while requests arrived, the warm-up left out."""
    arrivals = [record.arrival_s for record in run.requests.values()] or [0.0]
    start_s, end_s = min(arrivals) + warmup_s, max(arrivals)
    ends = (r.finished_s for r in run.requests.values() if r.is_answered)
    num = sum(end is not None and start_s <= end <= end_s for end in ends)
    return num / max(end_s - start_s, 1e-9)


def _too_short(run: Run) -> ConfigError:
    return ConfigError(
        f"{run.mix}, load {run.load:.2f}, {run.side}: after the warm-up too few requests arrive, "
        "or are answered while others do, to be judged. Give more --seconds."
    )


def line_of(run: Run) -> str:
    tiers = ", ".join(
        f"{name.removesuffix('_attainment_share')} {share:.1%}"
        for name, share in run.figures.items()
        if name.endswith("_attainment_share")
    )
    return (
        f"{run.mix}, load {run.load:.2f}, {run.side}: goodput {goodput(run):.2f}/s ({tiers}), "
        f"busy {run.figures['busy_share']:.0%}, {run.figures['num_switches']:.0f} switches"
    )


def goodput(run: Run) -> float:
    return run.figures.get("goodput_requests_per_s", 0.0)


# --- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    saturation_per_s: float
    alone_capacity: float
    points: list[Point]
    runs: list[Run]


class Simulates(Protocol):
    """What the search needs: `Foresight`, or whoever knows without a run."""

    @property
    def note(self) -> Note: ...

    def run(self, side: Side, mix: Mixes, load: float) -> Run: ...


def foresee(foresight: Simulates, layouts: list[str], ours: Side) -> Found:
    """Points of ours, of the best static layouts by policy, and of priority alone on the widest
    layout, which comes first in `layouts`."""
    search = _Search(foresight, layouts, ours)
    saturation = search.saturation()
    search.note(f"saturation {saturation:.2f} requests/s")
    points = search.points(saturation)
    return Found(saturation, search.alone_capacity(saturation), points, search.runs)


class _Search:
    def __init__(self, foresight: Simulates, layouts: list[str], ours: Side) -> None:
        self.foresight = foresight
        self.layouts = layouts
        self.ours = ours
        self.note = foresight.note
        self.runs: list[Run] = []

    def saturation(self) -> float:
        return max(self._saturation(side) for side in self._statics("fcfs"))

    def _saturation(self, side: Side) -> float:
        """Twice the load until it is far too much."""
        load = 1.0
        while True:
            run = self._run(side, "mixed", load)
            answered = run.figures["answered_per_s"]
            if not answered:
                raise _too_short(run)
            if answered < _ANSWERED * load:
                return answered
            load *= 2.0

    def points(self, saturation: float) -> list[Point]:
        sides = {policy: self._statics(policy) for policy in POLICIES}
        best = {name: self._best(found, saturation) for name, found in sides.items()}
        above = {name: self._above(found, saturation) for name, found in sides.items()}
        mine = self._best([self.ours], saturation)
        mine_above = self._above([self.ours], saturation)
        points = [self._point("ours_saturated", *mine_above)]
        points += [self._point(f"static_{name}_saturated", *above[name]) for name in POLICIES]
        points += [self._point("ours_best", *mine)]
        points += [self._point(f"static_{name}_best", *best[name]) for name in POLICIES]
        for name, run in (("saturated", mine_above[1]), ("best", mine[1])):
            points.append(self._alone(f"alone_{name}", run.load))
        return [*points, *self._shifting(saturation)]

    def _best(self, sides: list[Side], saturation: float) -> tuple[Side, Run]:
        return self._most(sides, "mixed", [share * saturation for share in SHARES])

    def _above(self, sides: list[Side], saturation: float) -> tuple[Side, Run]:
        return self._most(sides, "mixed", [SATURATED * saturation])

    def _shifting(self, saturation: float) -> list[Point]:
        loads = [share * saturation for share in SHIFTING_SHARES]
        side, run = self._most(self._statics("nitsum"), "shifting", loads)
        mine = self._run(self.ours, "shifting", run.load)
        return [
            self._point("ours_shifting", self.ours, mine),
            self._point("static_nitsum_shifting", side, run),
        ]

    def alone_capacity(self, saturation: float) -> float:
        """0 where not even the lowest load is served so."""
        reached = 0.0
        for share in ALONE_SHARES:
            run = self._run(self._widest, "alone", share * saturation)
            if run.figures.get("priority_attainment_share", 0.0) < IN_TIME:
                break
            reached = run.load
        return reached

    @property
    def _widest(self) -> Side:
        return self._statics("nitsum")[0]

    def _alone(self, name: str, load: float) -> Point:
        return self._point(name, self._widest, self._run(self._widest, "alone", load))

    def _most(self, sides: list[Side], mix: Mixes, loads: Iterable[float]) -> tuple[Side, Run]:
        runs = [(side, self._run(side, mix, load)) for load in loads for side in sides]
        return max(runs, key=lambda pair: goodput(pair[1]))

    def _statics(self, policy: Policy) -> list[Side]:
        return [Side(plans=[name], policy=policy) for name in self.layouts]

    def _run(self, side: Side, mix: Mixes, load: float) -> Run:
        run = self.foresight.run(side, mix, load)
        if run not in self.runs:
            self.runs.append(run)
        return run

    def _point(self, name: str, side: Side, run: Run) -> Point:
        return Point(name=name, side=side, mix=run.mix, load=run.load, simulated=run.figures)
