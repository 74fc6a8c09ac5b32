"""Plans as pictures: ranks across, one row a layer, lanes as boxes.

TP2/4xTP1
  rank   0     1     2     3
      [ TP2     ] ...
"""

from __future__ import annotations

from collections.abc import Sequence

from nitsum.plan import Lane, Plan, PlanSet

CELL_WIDTH = 10
"""Columns of one rank."""


def draw_plan_set(plan_set: PlanSet) -> str:
    """All plans, the initial one marked."""
    return "\n\n".join(
        draw_plan(plan, plan_set.num_ranks, initial=plan.name == plan_set.initial)
        for plan in plan_set.plans
    )


def draw_plan(plan: Plan, num_ranks: int, *, initial: bool = False) -> str:
    """One plan: its name, the ranks, and a row of boxes for each layer of lanes."""
    notes = [note for note, holds in (("overlay", plan.is_overlay), ("initial", initial)) if holds]
    title = plan.name + (f"   ({', '.join(notes)})" if notes else "")
    header = "".join(f"rank {rank}".center(CELL_WIDTH) for rank in range(num_ranks)).rstrip()
    rows = [row for layer in _layers(plan.lanes) for row in _draw_layer(layer, num_ranks)]
    return "\n".join([title, header, *rows, *_tier_lines(plan)])


def _layers(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes stacked so that no two of one layer share a rank; order is kept."""
    layers: list[list[Lane]] = []
    for lane in lanes:
        for layer in layers:
            if not any(lane.group.overlaps(other.group) for other in layer):
                layer.append(lane)
                break
        else:
            layers.append([lane])
    return layers


def _draw_layer(layer: list[Lane], num_ranks: int) -> list[str]:
    rows = [[" "] * (CELL_WIDTH * num_ranks) for _ in range(3)]
    for lane in layer:
        start, width = lane.ranks.start * CELL_WIDTH, CELL_WIDTH * lane.degree
        box = (f"┌{'─' * (width - 2)}┐", f"│{_label(lane):^{width - 2}}│", f"└{'─' * (width - 2)}┘")
        for row, line in zip(rows, box, strict=True):
            row[start : start + width] = line
    return ["".join(row).rstrip() for row in rows]


def _label(lane: Lane) -> str:
    return f"TP{lane.degree}" if lane.role == "mixed" else f"TP{lane.degree} {lane.role[:3]}"


def _tier_lines(plan: Plan) -> list[str]:
    """Which tiers prefer which lanes, where lanes differ."""
    by_tiers: dict[tuple[str, ...], list[str]] = {}
    for lane in plan.lanes:
        by_tiers.setdefault(lane.tiers, []).append(str(lane))
    if set(by_tiers) == {()}:
        return []
    return [
        f"{', '.join(lanes)}: {', '.join(tiers) or 'all tiers'}"
        for tiers, lanes in by_tiers.items()
    ]
