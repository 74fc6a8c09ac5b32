"""What could have been: the best sequence of plans when all that arrives is known.

Time is cut into equal cells. Every cell has a value for each plan (its score on what arrives in the
cell); changing plan between two cells costs what the switch takes. The best sequence follows by
dynamic programming, hence exactly; what it is worth in a run is for a simulation to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Path(NamedTuple):
    plans: list[int]
    """One in each cell."""
    value: float
    """Sum over the cells, switches paid."""


def best_path(values: Sequence[Sequence[float]], prices: Sequence[Sequence[float]]) -> Path:
    """Over `values[cell][plan]` (at least one cell), with `prices[a][b]` to go from a to b.

    The plan of the first cell is free.
    """
    num_plans = len(values[0])
    reached = list(values[0])
    came_from: list[list[int]] = []
    for cell in values[1:]:
        best = [
            max(range(num_plans), key=lambda a, b=b: reached[a] - prices[a][b])
            for b in range(num_plans)
        ]
        came_from.append(best)
        reached = [reached[best[b]] - prices[best[b]][b] + cell[b] for b in range(num_plans)]
    last = max(range(num_plans), key=lambda plan: reached[plan])
    plans = [last]
    for sources in reversed(came_from):
        plans.append(sources[plans[-1]])
    return Path(plans[::-1], reached[last])
