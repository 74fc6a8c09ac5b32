"""A cost model that learns from what steps really took."""

from __future__ import annotations

from nitsum.cost.protocol import CostModel
from nitsum.plan import Lane
from nitsum.step import BatchShape

_LEAST, _MOST = 0.25, 4.0
"""A factor outside these bounds would say that the table is of another machine."""


class CorrectedCost:
    """Multiplies predictions by one running factor per degree.

    One factor per degree, not per batch: a factor that differed between batches could make a
    larger batch look cheaper, and schedulers search on the promise that it never does.
    """

    def __init__(self, base: CostModel, weight: float = 0.02) -> None:
        self.base = base
        self._base_time = base.step_time
        self.weight = weight
        """Of one new step in the running mean."""
        self.factors: dict[int, float] = {}

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        return self._base_time(lane, batch) * self.factors.get(lane.group.degree, 1.0)

    def move_time(self, num_bytes: int) -> float:
        return self.base.move_time(num_bytes)

    def offload_time(self, num_bytes: int) -> float:
        return self.base.offload_time(num_bytes)

    def observe(self, lane: Lane, batch: BatchShape, seconds: float) -> None:
        """Take note that a step of `batch` took `seconds`."""
        ratio = seconds / self.base.step_time(lane, batch)
        ratio = min(max(ratio, _LEAST), _MOST)
        factor = self.factors.get(lane.degree, 1.0)
        self.factors[lane.degree] = factor + self.weight * (ratio - factor)
