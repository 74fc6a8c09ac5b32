"""Small systems whose steps are easy to reckon with."""

from __future__ import annotations

from dataclasses import replace

from nitsum.cost.machines import Machine
from nitsum.cost.protocol import CostModel, FixedCost
from nitsum.cost.shapes import shape_named
from nitsum.plan import PlanSet, parse_plan
from nitsum.sim.system import Site, System, build_system
from nitsum.workload.items import Segment, WorkItem


def small_system(
    *plans: str,
    cost: CostModel | None = None,
    policy: str = "fcfs",
    num_ranks: int = 2,
    num_blocks: int = 512,
    checks: bool = False,
    **settings: object,
) -> System:
    """A tiny model on CPU ranks; a narrowest lane's arena holds `num_blocks` blocks."""
    site = Site(
        model="Qwen2.5-0.5B",
        shape=shape_named("Qwen2.5-0.5B"),
        machine=Machine.parse(f"{num_ranks}xCPU"),
        **settings,  # type: ignore[arg-type]
    )
    parsed = tuple(parse_plan(name, num_ranks) for name in plans)
    system = build_system(
        site,
        "test",
        PlanSet(num_ranks, parsed, plans[0]),
        policy,  # type: ignore[arg-type]
    )
    pages = system.arena.units_per_block // system.arena.min_degree or 1
    return replace(
        system,
        cost=cost or FixedCost(),
        arena=replace(system.arena, num_units=num_blocks * pages),
        config=replace(system.config, check_accounting=checks),
    )


def item(
    name: str, at_s: float, num_prompt: int, num_output: int, tier: str = "default"
) -> WorkItem:
    return WorkItem(name, at_s, num_output, tier, "t", (Segment(name, num_prompt),))
