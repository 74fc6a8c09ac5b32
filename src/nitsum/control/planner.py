"""Offline: every feasible layout on every situation of a workload, and the few to hold ready.

A situation is the load of one phase, at several times its rate, and tilted towards each tier. Plans
are compared with static layouts that keep only their own shard and get the freed memory as KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nitsum.control.load import Load
from nitsum.control.load import scaled as scaled_load
from nitsum.control.score import Limits, PlanScore, Scorer
from nitsum.control.search import best_set, feasible_plans
from nitsum.control.steps import StepTimes
from nitsum.cost.machines import Machine
from nitsum.cost.memory import MemoryModel
from nitsum.cost.site import ModelSite
from nitsum.errors import ConfigError
from nitsum.plan import Plan, PlanSet, parse_plan
from nitsum.shape import Geometry, ModelShape

SCALES = (0.5, 1.0, 2.0)
TILT = 3.0
"""A situation tilted towards a tier has this many times its requests, and fewer of the others."""
WORTH_MORE_WEIGHTS = 0.02
"""A smaller min_tp takes KV room from all plans, so it has to bring this much more goodput."""
MIXED_STEP_COPIES = 4
"""Activations of a step that a group's buffers hold at once: in, out, gathered, reduced."""


@dataclass(frozen=True)
class Situation:
    name: str
    load: Load
    weight: float = 1.0


def situations(phases: Sequence[tuple[str, float, Load]]) -> list[Situation]:
    """From (name, weight, load) of each phase: as it is, scaled and tilted."""
    found: list[Situation] = []
    for name, weight, load in phases:
        share = weight / (len(SCALES) + (len(load) if len(load) > 1 else 0))
        found += [Situation(f"{name} x{s:g}", scaled_load(load, s), share) for s in SCALES]
        if len(load) > 1:
            found += [
                Situation(f"{name}, more {t.tier}", tilted(load, t.tier), share) for t in load
            ]
    return found


def tilted(load: Load, tier: str) -> Load:
    """As many requests, of which `tier` has a larger share."""
    total = sum(t.rate_per_s for t in load)
    weights = [t.rate_per_s * (TILT if t.tier == tier else 1.0) for t in load]
    factor = total / max(sum(weights), 1e-12)
    return tuple(replace(t, rate_per_s=w * factor) for t, w in zip(load, weights, strict=True))


@dataclass(frozen=True, kw_only=True)
class PlanSite(ModelSite):
    """What is planned for."""

    min_lane_tokens: int = 1 << 13
    """KV a lane must have room for: the longest request that is to be served."""

    def lane_limits(self, memory: MemoryModel) -> Limits:
        """As the controller of a server has them."""
        own = self.limits
        return Limits(own.max_num_seqs, own.max_mixed_tokens, memory.lane_tokens)

    def memory(self, min_tp: int, max_tp: int) -> MemoryModel:
        return MemoryModel(Geometry(self.shape, max_tp, min_tp), self.machine, self.dtype_bytes)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One layout, judged."""

    plan: Plan
    scores: tuple[PlanScore, ...]
    """In each situation."""
    value: float
    """Weighted mean over the situations."""
    kv_tokens: int
    redundancy_share: float
    """KV room lost against a static layout of the same plan."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What `nitsum plan` found."""

    situations: tuple[Situation, ...]
    entries: tuple[Entry, ...]
    """Every feasible plan, the best single one first."""
    statics: tuple[Entry, ...]
    """Uniform static layouts with their own shard only, the best first."""
    chosen: PlanSet
    min_tp: int
    set_value: float
    """With the best of the chosen plans in every situation."""
    buffer_bytes: int
    """Per rank: communication buffers of all groups of the chosen plans."""
    buffer_share: float
    """Of the device's memory."""

    @property
    def best_static(self) -> Entry:
        return self.statics[0]


def degrees_that_fit(site: PlanSite) -> list[int]:
    """Degrees at which a static lane holds the longest request."""
    widest = site.machine.num_gpus
    found = [
        degree
        for degree in (1 << bit for bit in range(widest.bit_length()))
        if site.memory(degree, degree).lane_tokens(degree) >= site.min_lane_tokens
        and _known(site, degree)
    ]
    if not found:
        raise ConfigError(
            f"The model does not fit {site.machine} with {site.min_lane_tokens} tokens of KV. "
            "Use more or larger GPUs, or serve shorter requests."
        )
    return found


def _known(site: PlanSite, degree: int) -> bool:
    """A measured table holds only the degrees that were measured."""
    if site.cost is None:
        return True
    try:
        StepTimes(site.cost, [degree])
    except ConfigError:
        return False
    return True


def search(site: PlanSite, cases: Sequence[Situation], num_plans: int = 4) -> PlanReport:
    """The best set of at most `num_plans` plans, over every min_tp that leaves room for KV.

    Raises `ConfigError` when no layout holds the longest request.
    """
    degrees = degrees_that_fit(site)
    statics = sorted((_static(site, d, cases) for d in degrees), key=lambda e: -e.value)
    best: PlanReport | None = None
    for min_tp in reversed(degrees):
        memory = site.memory(min_tp, degrees[-1])
        if memory.lane_tokens(min_tp) < site.min_lane_tokens:
            continue
        report = _search(site, cases, num_plans, [d for d in degrees if d >= min_tp], statics)
        if best is None or report.set_value > best.set_value * (1.0 + WORTH_MORE_WEIGHTS):
            best = report
    assert best is not None, "the widest degree alone fits"
    return best


def _search(
    site: PlanSite,
    cases: Sequence[Situation],
    num_plans: int,
    degrees: list[int],
    statics: list[Entry],
) -> PlanReport:
    memory = site.memory(degrees[0], degrees[-1])
    scorer = _scorer(site, memory, degrees)
    plans = feasible_plans(site.machine.num_gpus, degrees)
    scores = _score_all(scorer, plans, cases)
    values = [[s.value * c.weight for s, c in zip(row, cases, strict=True)] for row in scores]
    chosen = best_set(values, num_plans)
    chosen.sort(key=lambda row: -sum(values[row]))
    total_weight = sum(case.weight for case in cases)
    entries = [
        Entry(
            plan=plan,
            scores=tuple(row),
            value=sum(of_plan) / total_weight,
            kv_tokens=memory.plan_tokens(plan),
            redundancy_share=max(memory.redundancy_share(lane.degree) for lane in plan.lanes),
        )
        for plan, row, of_plan in zip(plans, scores, values, strict=True)
    ]
    picked = tuple(plans[row] for row in chosen)
    plan_set = PlanSet(site.machine.num_gpus, picked, picked[0].name)
    num_bytes = buffer_bytes(site, plan_set)
    return PlanReport(
        situations=tuple(cases),
        entries=tuple(sorted(entries, key=lambda entry: -entry.value)),
        statics=tuple(statics),
        chosen=plan_set,
        min_tp=degrees[0],
        set_value=sum(map(max, zip(*(values[row] for row in chosen), strict=True))) / total_weight,
        buffer_bytes=num_bytes,
        buffer_share=num_bytes / site.machine.gpu.memory_bytes,
    )


def _score_all(
    scorer: Scorer, plans: Sequence[Plan], cases: Sequence[Situation]
) -> list[list[PlanScore]]:
    """[plan][situation]; the scorer keeps capacities while the situation stays the same."""
    columns = [[scorer.score(plan, case.load) for plan in plans] for case in cases]
    return [list(row) for row in zip(*columns, strict=True)]


def _scorer(site: PlanSite, memory: MemoryModel, degrees: Sequence[int]) -> Scorer:
    cost = site.cost_model(memory.geometry.min_tp, memory.geometry.max_tp)
    return Scorer(StepTimes(cost, degrees), site.lane_limits(memory))


def static_scorer(site: PlanSite, degree: int) -> Scorer:
    """Of uniform lanes that keep their own shard only."""
    return _scorer(site, site.memory(degree, degree), [degree])


def _static(site: PlanSite, degree: int, cases: Sequence[Situation]) -> Entry:
    """Uniform lanes that keep their own shard only."""
    num_lanes = site.machine.num_gpus // degree
    plan = parse_plan(
        f"{num_lanes}xTP{degree}" if num_lanes > 1 else f"TP{degree}", site.machine.num_gpus
    )
    memory = site.memory(degree, degree)
    scorer = _scorer(site, memory, [degree])
    scores = tuple(scorer.score(plan, case.load) for case in cases)
    weighted = sum(s.value * c.weight for s, c in zip(scores, cases, strict=True))
    return Entry(
        plan=plan,
        scores=scores,
        value=weighted / sum(case.weight for case in cases),
        kv_tokens=memory.plan_tokens(plan),
        redundancy_share=0.0,
    )


def buffer_bytes(site: PlanSite, plans: PlanSet) -> int:
    """Communication buffers of the widest rank: one set a group it belongs to, from sizes alone.

    Graphs and the groups' own memory are measured when workers start, not predicted.
    """
    step_bytes = site.limits.max_batch_tokens * site.shape.hidden_size * site.dtype_bytes
    num_groups = max(
        sum(rank in group.ranks and group.degree > 1 for group in plans.groups)
        for rank in range(plans.num_ranks)
    )
    return MIXED_STEP_COPIES * step_bytes * num_groups


def redundancy_table(shape: ModelShape, machine: Machine) -> list[tuple[int, int, float]]:
    """(min_tp, degree, share of a static layout's KV room lost) for every pair that fits."""
    rows: list[tuple[int, int, float]] = []
    widest = machine.num_gpus
    degrees = [1 << bit for bit in range(widest.bit_length())]
    for min_tp in degrees:
        memory = MemoryModel(Geometry(shape, widest, min_tp), machine)
        if memory.arena_bytes > 0:
            rows += [(min_tp, d, memory.redundancy_share(d)) for d in degrees if d >= min_tp]
    return rows


def plan_entries(plans: PlanSet) -> list[dict[str, object]]:
    """As `read_plans` takes them back: every lane written out."""
    return [
        {
            "name": plan.name,
            "lanes": [
                {"ranks": list(lane.ranks), "role": lane.role, "tiers": list(lane.tiers)}
                for lane in plan.lanes
            ],
        }
        for plan in plans.plans
    ]
