"""The hindsight reference: the best plan sequence on a grid of five seconds, then simulated.

The sequence is the best by the planner's estimate, every switch paid for; its worth is what the
simulator says it serves. A run is compared with the best of it and all static layouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from nitsum.control.classes import Shape
from nitsum.control.hindsight import best_path
from nitsum.control.load import Load, Sample, by_level, sum_up
from nitsum.control.score import Scorer
from nitsum.metrics.targets import Targets
from nitsum.plan import PlanSet
from nitsum.sim.run import Options, PlannedSwitch, SimResult, controller_of, simulate
from nitsum.sim.system import System
from nitsum.tier import TierSet
from nitsum.workload.items import WorkItem

GRID_S = 5.0
SEEN_S = 15.0
"""A cell is valued on what arrives in this long around its middle: five seconds hold too few."""
SWITCH_S = 0.2
"""Of the machine's time that a change of plan is taken to cost."""


def hindsight_run(
    system: System,
    items: Sequence[WorkItem],
    targets: Targets,
    options: Options,
    switch_s: float = SWITCH_S,
) -> SimResult:
    """Simulate the best sequence of the system's plans for `items`, which must be in order."""
    switches = best_switches(system, items, targets, switch_s)
    plans = system.config.plans
    first = PlanSet(plans.num_ranks, plans.plans, switches[0].plan)
    known = replace(system, config=replace(system.config, plans=first), steers=False)
    return simulate(known, items, targets=targets, options=replace(options, switches=switches[1:]))


def best_switches(
    system: System, items: Sequence[WorkItem], targets: Targets, switch_s: float = SWITCH_S
) -> tuple[PlannedSwitch, ...]:
    """When to be in which plan; the first entry is the plan to begin with."""
    scorer = controller_of(system).scorer
    tiers = TierSet(system.config.tiers)
    names = [plan.name for plan in system.config.plans.plans]
    shapes = [Shape.of(plan) for plan in system.config.plans.plans]
    num_cells = max(1, int(max(item.at_s for item in items) / GRID_S) + 1)
    loads = [_load_around((c + 0.5) * GRID_S, items, tiers, targets) for c in range(num_cells)]
    values = [_values(scorer, shapes, load) for load in loads]
    mean = sum(map(max, values)) / len(values) / GRID_S
    prices = [[0.0 if a == b else mean * switch_s for b in names] for a in names]
    path = best_path(values, prices).plans
    return tuple(
        PlannedSwitch(cell * GRID_S, names[plan])
        for cell, plan in enumerate(path)
        if cell == 0 or plan != path[cell - 1]
    )


def _values(scorer: Scorer, shapes: Sequence[Shape], load: Load) -> list[float]:
    if not load:
        return [0.0] * len(shapes)
    return [scorer.score(shape, load).value * GRID_S for shape in shapes]


def _load_around(
    middle_s: float, items: Iterable[WorkItem], tiers: TierSet, targets: Targets
) -> Load:
    by_tier: dict[str, list[WorkItem]] = defaultdict(list)
    for item in items:
        if abs(item.at_s - middle_s) <= SEEN_S / 2:
            by_tier[item.tier].append(item)
    return by_level(
        sum_up(
            tiers[name],
            [Sample(i.num_prompt, *targets.of(name, i.num_prompt)) for i in found],
            rate_per_s=len(found) / SEEN_S,
            output_tokens=sum(i.num_output for i in found) / len(found),
        )
        for name, found in by_tier.items()
    )
