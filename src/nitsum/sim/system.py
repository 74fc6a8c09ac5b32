"""One way to serve a model on a machine: resident plans, a policy, and the memory they leave.

What is compared on identical arrivals are systems. A static one keeps only its own weight shard
and gets the freed memory as KV; one that switches holds 1/min_tp of the weights on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from nitsum.config import EngineConfig, Policy
from nitsum.cost.analytic import step_work
from nitsum.cost.memory import MemoryModel, smallest_min_tp
from nitsum.cost.protocol import CostModel
from nitsum.cost.site import ModelSite
from nitsum.errors import ConfigError
from nitsum.kv.cache import ArenaShape
from nitsum.limits import StepLimits
from nitsum.metrics.ranks import WorkOf
from nitsum.metrics.targets import Targets, default_targets
from nitsum.plan import Lane, Plan, PlanSet, default_plans, parse_plan
from nitsum.shape import Geometry
from nitsum.tier import DEFAULT_TIERS, Tier

URGENT_TIERS = ("priority", "default")
PATIENT_TIERS = ("flex", "batch")
_USEFUL_TOKENS = 1 << 16
_LONG_REQUEST_TOKENS = 1 << 13


@dataclass(frozen=True, kw_only=True)
class Site(ModelSite):
    """What all systems of a comparison share."""

    model: str
    tiers: tuple[Tier, ...] = DEFAULT_TIERS
    max_model_len: int = 0
    block_tokens: int = 0
    """0 is what is served on such a machine."""
    prefix_cache: bool = True
    kv_bytes: int = 0
    """KV arena of one rank; 0 is what each system's weights leave."""
    host_kv_bytes: int = 0
    """Host memory of one rank for KV of displaced requests."""

    @property
    def limits(self) -> StepLimits:
        limits = super().limits
        return replace(limits, block_tokens=self.block_tokens or limits.block_tokens)

    @property
    def min_tp(self) -> int:
        """The smallest degree whose lanes are of use: each holds a few dozen conversations."""
        return smallest_min_tp(self.shape, self.machine, min_tokens=_USEFUL_TOKENS)

    @property
    def narrowest(self) -> int:
        """The smallest degree at which a lane holds one long request."""
        return smallest_min_tp(self.shape, self.machine, min_tokens=_LONG_REQUEST_TOKENS)


@dataclass(frozen=True)
class System:
    """What a simulation runs."""

    name: str
    config: EngineConfig
    arena: ArenaShape
    cost: CostModel
    work_of: WorkOf
    steers: bool = False
    """The controller chooses among the plans; else the first one stays until told otherwise."""
    threshold_tokens: int = 0
    """Above 0: go to the first plan under fewer tokens per step than this, else to the last."""


def build_system(
    site: Site, name: str, plans: PlanSet, policy: Policy, *, min_tp: int | None = None
) -> System:
    """A system whose ranks hold 1/min_tp of the weights; by default as little as `plans` allow.

    Raises `ConfigError` when that leaves no room for KV.
    """
    min_tp = plans.degrees[0] if min_tp is None else min_tp
    geometry = Geometry(site.shape, plans.max_tp, min_tp)
    arena = _arena(site, name, plans, geometry)
    cost = site.cost_model(min_tp, plans.max_tp)
    config = _config(site, plans, policy, min_tp, arena.num_units * arena.unit_bytes)
    work_of = partial(step_work, geometry, dtype_bytes=site.dtype_bytes)
    return System(name, config, arena, cost, work_of)


def _arena(site: Site, name: str, plans: PlanSet, geometry: Geometry) -> ArenaShape:
    """What the weights leave for KV on every rank, in units."""
    memory = MemoryModel(geometry, site.machine, site.dtype_bytes)
    arena_bytes = site.kv_bytes or memory.arena_bytes
    unit_bytes = geometry.unit_bytes(site.limits.block_tokens, site.dtype_bytes)
    num_units = max(0, arena_bytes) // unit_bytes
    if num_units < geometry.units_per_page(plans.degrees[0]):
        raise ConfigError(
            f"{name}: {site.model} leaves a TP{plans.degrees[0]} lane on {site.machine} no room "
            "for KV. Use wider lanes, a larger --min-tp or larger GPUs."
        )
    return ArenaShape(
        num_ranks=site.num_ranks,
        num_units=num_units,
        units_per_block=geometry.num_units,
        block_tokens=site.limits.block_tokens,
        min_degree=plans.degrees[0],
        unit_bytes=unit_bytes,
        num_host_units=site.host_kv_bytes // unit_bytes,
    )


def _config(
    site: Site, plans: PlanSet, policy: Policy, min_tp: int, arena_bytes: int
) -> EngineConfig:
    return EngineConfig(
        model=site.model,
        plans=plans,
        device=site.machine.device,
        policy=policy,
        min_tp=min_tp,
        dtype=site.dtype,
        block_tokens=site.limits.block_tokens,
        kv_bytes=arena_bytes,
        host_kv_bytes=site.host_kv_bytes,
        max_model_len=site.max_model_len or site.shape.max_positions,
        max_num_seqs=site.limits.max_num_seqs,
        max_batch_tokens=site.limits.max_batch_tokens,
        max_mixed_tokens=site.limits.max_mixed_tokens,
        tiers=site.tiers,
        prefix_cache=site.prefix_cache,
    )


def site_targets(site: Site) -> Targets:
    """The default target rule, from lone steps at the smallest degree that is of use."""
    degree = site.min_tp
    cost = site.cost_model(degree, site.num_ranks)
    kind = "a measured table" if site.cost else "the analytic cost model"
    return default_targets(cost, degree, f"{site.model} on {site.machine}, TP{degree}, {kind}")


# --- the systems of a comparison -----------------------------------------------------------------


def static_system(site: Site, plan: Plan, policy: Policy) -> System:
    """One plan for ever, with the shard of its own degree and nothing else."""
    plans = PlanSet(site.num_ranks, (plan,), plan.name)
    return build_system(site, f"{plan.name} {policy}", plans, policy)


def our_system(site: Site, names: tuple[str, ...] = (), min_tp: int | None = None) -> System:
    """Several resident plans under our scheduler; without names, all useful ones."""
    min_tp = min_tp or site.min_tp
    plans = _named(site, names) if names else _all_plans(site, min_tp)
    return build_system(site, "ours", plans, "nitsum", min_tp=min_tp)


def _named(site: Site, names: tuple[str, ...]) -> PlanSet:
    plans = tuple(parse_plan(name, site.num_ranks) for name in names)
    return PlanSet(site.num_ranks, plans, plans[0].name)


def _all_plans(site: Site, min_tp: int) -> PlanSet:
    plans = tuple(
        plan
        for plan in default_plans(site.num_ranks).plans
        if all(lane.degree >= min_tp for lane in plan.lanes)
    )
    return PlanSet(site.num_ranks, plans, plans[-1].name)


def baselines(site: Site) -> Iterator[System]:
    """Every static layout under every policy, ranks split by tier, and a token threshold."""
    degrees = [d for d in _degrees(site) if d >= site.narrowest]
    for degree in degrees:
        for policy in ("fcfs", "priority", "nitsum"):
            yield static_system(site, uniform_plan(site.num_ranks, degree), policy)
    if site.num_ranks >= 2 and degrees[0] <= site.num_ranks // 2:
        for plan in split_plans(site.num_ranks, degrees):
            yield static_system(site, plan, "nitsum")
    if len(degrees) > 1:
        yield threshold_system(site, degrees)


def _degrees(site: Site) -> list[int]:
    return [1 << bit for bit in range(site.num_ranks.bit_length())]


def uniform_plan(num_ranks: int, degree: int) -> Plan:
    count = num_ranks // degree
    return parse_plan(f"TP{degree}" if count == 1 else f"{count}xTP{degree}", num_ranks)


def split_plans(num_ranks: int, degrees: list[int]) -> Iterator[Plan]:
    """Half of the ranks for the urgent tiers, half for the others, each at every degree."""
    half = num_ranks // 2
    fitting = [degree for degree in degrees if degree <= half]
    for urgent in fitting:
        for patient in fitting:
            first = uniform_plan(half, urgent)
            second = uniform_plan(half, patient)
            lanes = [Lane(lane.group, "mixed", URGENT_TIERS) for lane in first.lanes]
            lanes += [_shifted(lane, half // patient) for lane in second.lanes]
            yield Plan(f"split {first.name}|{second.name}", tuple(lanes))


def _shifted(lane: Lane, num_groups: int) -> Lane:
    group = type(lane.group)(lane.degree, lane.group.index + num_groups)
    return Lane(group, "mixed", PATIENT_TIERS)


def threshold_system(site: Site, degrees: list[int], threshold_tokens: int = 256) -> System:
    """The widest layout under few tokens per step, the narrowest above: no look ahead."""
    wide = uniform_plan(site.num_ranks, degrees[-1])
    narrow = uniform_plan(site.num_ranks, degrees[0])
    plans = PlanSet(site.num_ranks, (wide, narrow), wide.name)
    system = build_system(site, f"threshold {wide.name}/{narrow.name}", plans, "nitsum")
    return replace(system, threshold_tokens=threshold_tokens)
