"""Whether changing plans pays: windows of load, each served by every static layout, by ours with
its controller, and by the best sequence of plans that a search finds with hindsight.

What changing could gain is reckoned too: the best static layout *of every cell* of the window, as
if changing between two cells cost nothing (`layout_bound`). It would be a ceiling if every cell
served its requests on its own; since queues, or what a cell spares the next, go on, it can be
passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import yaml

from nitsum.control.decisions import told
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.errors import ConfigError
from nitsum.events import AnyEvent, EventLog, PlanDecided, PlanJudged
from nitsum.metrics.goodput import arrival_window, judged, met
from nitsum.metrics.targets import Targets, held_to
from nitsum.plan import parse_plan, read_plans
from nitsum.sim.hindsight import hindsight_run
from nitsum.sim.run import Options, SimResult, simulate
from nitsum.sim.system import (
    Site,
    System,
    build_system,
    site_targets,
    static_system,
    uniform_plan,
)
from nitsum.workload.generate import generate
from nitsum.workload.items import WorkItem
from nitsum.workload.spec import MixSpec, check_mix

Note = Callable[[str], None]


class StudyWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One load."""

    mix: MixSpec
    shifting: bool = False
    """The mix flips, so that no layout is the best all the time."""


class Article(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The published setting: 30% priority and 70% default requests, at rising rates."""

    loads: list[float]
    """Requests per second."""
    duration_s: float
    lengths: str
    warmup_s: float = 30.0


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file: what is served on what, and under which loads."""

    model: str
    machine: str
    plans: list[str]
    """Those that ours holds ready, the first one at the start."""
    windows: list[StudyWindow]
    article: Article | None = None
    statics: list[str] = []
    """Layouts it is compared with; empty: uniform lanes of every degree that fits."""
    warmup_s: float = 60.0
    """Arrivals before that are not judged."""
    block_tokens: int = 16
    """Of the KV cache. Like the bounds below it stays what it is when `serve` comes to another
    default, so that figures of one study can be compared."""
    max_num_seqs: int = 256
    max_batch_tokens: int = 2048
    max_mixed_tokens: int = 0
    """Of steps with decodes; 0: as of any step."""
    cell_s: float = 30.0
    drain_s: float = 60.0
    switch_costs_s: list[float] = []
    """Added to every switch, all ranks standing still, in runs of their own."""


def load_study(path: Path, data: Path) -> Study:
    """Read a study; traces are looked for in `data`. Raises `ConfigError` saying what is wrong."""
    try:
        study = msgspec.convert(yaml.safe_load(path.read_text()), Study)
    except OSError as error:
        raise ConfigError(f"Cannot read study {path}: {error.strerror}.") from error
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"Study {path}: {error}.") from error
    windows = [msgspec.structs.replace(w, mix=_located(w.mix, data)) for w in study.windows]
    for window in windows:
        check_mix(window.mix, f"{path}: window {window.mix.name}")
    return msgspec.structs.replace(study, windows=windows)


def _located(mix: MixSpec, data: Path) -> MixSpec:
    streams = tuple(
        msgspec.structs.replace(s, trace=str(data / s.trace)) if s.trace else s for s in mix.streams
    )
    return msgspec.structs.replace(mix, streams=streams)


# --- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What one system made of one window."""

    system: str
    met: list[int]
    """Requests in time, by the cell in which they arrived."""
    num_requests: int
    span_s: float
    attainment: dict[str, float]
    """Share in time, by tier."""
    busy_share: float
    num_switches: int
    cpu_s: float
    events: list[AnyEvent] = field(default_factory=list[AnyEvent])
    """Decisions and switches."""

    @property
    def goodput_per_s(self) -> float:
        return sum(self.met) / self.span_s


def served(result: SimResult, name: str, targets: Targets, study: Study) -> Served:
    records = list(result.recorder.requests.values())
    window = arrival_window(records, study.warmup_s)
    found = judged(records, window)
    cells = [0] * max(1, -int(-window.length_s // study.cell_s))
    by_tier: dict[str, list[bool]] = {}
    for record in found:
        is_met = met(record, targets.of_record(record))
        cell = int((record.arrival_s - window.start_s) / study.cell_s)
        cells[min(cell, len(cells) - 1)] += is_met
        by_tier.setdefault(record.tier_asked, []).append(is_met)
    return Served(
        system=name,
        met=cells,
        num_requests=len(found),
        span_s=max(window.length_s, 1e-9),
        attainment={tier: sum(each) / len(each) for tier, each in sorted(by_tier.items())},
        busy_share=sum(result.busy_share) / len(result.busy_share),
        num_switches=len(result.reports),
        cpu_s=result.cpu_s,
    )


# --- one window ----------------------------------------------------------------------------------


@dataclass
class WindowResult:
    name: str
    shifting: bool
    statics: list[Served]
    ours: Served
    path: Served
    """The sequence that the search finds."""
    by_cost: dict[float, Served] = field(default_factory=dict[float, Served])

    @property
    def best_static(self) -> Served:
        return max(self.statics, key=lambda each: sum(each.met))

    @property
    def layout_bound(self) -> float:
        """Best layout of every cell over the best layout of all."""
        cells = zip(*(each.met for each in self.statics), strict=True)
        return sum(map(max, cells)) / max(1, sum(self.best_static.met))

    def over_static(self, each: Served) -> float:
        return sum(each.met) / max(1, sum(self.best_static.met))

    @property
    def hindsight(self) -> Served:
        """The best of every static layout, what the search finds, and ours."""
        return max((*self.statics, self.path, self.ours), key=lambda each: sum(each.met))

    @property
    def over_hindsight(self) -> float:
        return sum(self.ours.met) / max(1, sum(self.hindsight.met))


@dataclass(frozen=True)
class Bench:
    """Systems and targets of a study."""

    study: Study
    site: Site
    targets: Targets
    statics: list[System]
    ours: System

    @classmethod
    def of(cls, study: Study) -> Bench:
        site = Site(
            model=study.model,
            shape=shape_named(study.model),
            machine=Machine.parse(study.machine),
            block_tokens=study.block_tokens,
            max_num_seqs=study.max_num_seqs,
            max_batch_tokens=study.max_batch_tokens,
            max_mixed_tokens=study.max_mixed_tokens,
        )
        targets = site_targets(site)
        site = replace(site, tiers=held_to(site.tiers, targets))
        degrees = (1 << bit for bit in range(site.num_ranks.bit_length()))
        fitting = [uniform_plan(site.num_ranks, d) for d in degrees if d >= site.narrowest]
        named = [parse_plan(name, site.num_ranks) for name in study.statics]
        statics = [static_system(site, plan, "nitsum") for plan in named or fitting]
        plans = read_plans([*study.plans], site.num_ranks)
        ours = build_system(site, "ours", plans, "nitsum", min_tp=plans.degrees[0])
        return cls(study, site, targets, statics, replace(ours, steers=True))

    def run(self, window: StudyWindow, note: Note, *, costs: bool = True) -> WindowResult:
        """Every system on the window, one after another."""
        items = list(generate(window.mix))
        statics = [self._serve(system, items, note) for system in self.statics]
        ours = self._serve(self.ours, items, note)
        path = hindsight_run(self.ours, items, self.targets, self._options())
        result = WindowResult(
            name=window.mix.name,
            shifting=window.shifting,
            statics=statics,
            ours=ours,
            path=self._told(served(path, "search", self.targets, self.study), note),
        )
        for cost_s in self.study.switch_costs_s if costs else ():
            if ours.num_switches:
                result.by_cost[cost_s] = self._serve(self.ours, items, note, cost_s)
            else:
                result.by_cost[cost_s] = ours  # whatever it costs: there was none
        return result

    def _options(self, cost_s: float = 0.0) -> Options:
        return Options(drain_s=self.study.drain_s, switch_cost_s=cost_s)

    def _serve(
        self, system: System, items: Sequence[WorkItem], note: Note, cost_s: float = 0.0
    ) -> Served:
        log = _Decisions()
        result = simulate(
            system, items, targets=self.targets, options=self._options(cost_s), sink=log
        )
        name = f"{system.name}, switches cost {cost_s:g} s more" if cost_s else system.name
        found = served(result, name, self.targets, self.study)
        return self._told(replace(found, events=log.events), note)

    def _told(self, each: Served, note: Note) -> Served:
        note(line_of(each))
        return each


class _Decisions(EventLog):
    """Keeps what explains a run: decisions, judgements and switches."""

    def emit(self, event: AnyEvent) -> None:
        if isinstance(event, (PlanDecided, PlanJudged)) or "Switch" in type(event).__name__:
            super().emit(event)


def line_of(each: Served) -> str:
    tiers = ", ".join(f"{tier} {share:.1%}" for tier, share in each.attainment.items())
    return (
        f"  {each.system}: goodput {each.goodput_per_s:.3f}/s ({tiers}), busy "
        f"{each.busy_share:.0%}, {each.num_switches} switches, {each.cpu_s:.0f} s of one core"
    )


def explained(result: WindowResult) -> str:
    """What the controller did in the window, in words."""
    return "\n".join(told(result.ours.events))


# --- figures -------------------------------------------------------------------------------------


def figures(results: Sequence[WindowResult]) -> dict[str, float]:
    """By name; ratios are ours over theirs."""
    found: dict[str, float] = {}
    for result in results:
        found.update(_of_window(result))
    over = {r.name: r.over_static(r.ours) for r in results}
    found["goodput_vs_best_static_min"] = min(over.values())
    found["goodput_vs_hindsight_min"] = min(r.over_hindsight for r in results)
    shifting = [over[r.name] for r in results if r.shifting]
    if shifting:
        found["goodput_vs_best_static_shifting"] = min(shifting)
        found["layout_bound_shifting"] = min(r.layout_bound for r in results if r.shifting)
    by_cost = [r.over_static(each) for r in results for each in r.by_cost.values()]
    if by_cost:
        found["goodput_vs_best_static_min_any_switch_cost"] = min(by_cost)
    return found


def _of_window(result: WindowResult) -> Iterator[tuple[str, float]]:
    name = result.name
    for each in (*result.statics, result.path, result.ours):
        word = "".join(c if c.isalnum() else "_" for c in each.system).lower()
        yield f"{name}_{word}_goodput_requests_per_s", each.goodput_per_s
        yield f"{name}_{word}_busy_share", each.busy_share
    yield f"{name}_hindsight_goodput_requests_per_s", result.hindsight.goodput_per_s
    yield f"{name}_num_requests", float(result.ours.num_requests)
    yield f"{name}_num_switches", float(result.ours.num_switches)
    yield f"{name}_goodput_vs_best_static", result.over_static(result.ours)
    yield f"{name}_goodput_vs_hindsight", result.over_hindsight
    yield f"{name}_layout_bound", result.layout_bound
    for cost_s, each in result.by_cost.items():
        ms = f"{cost_s * 1e3:g}".replace(".", "p")
        yield f"{name}_goodput_vs_best_static_at_switch_cost_{ms}_ms", result.over_static(each)
