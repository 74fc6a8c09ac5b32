"""A cost model that learns from what steps really took."""

from __future__ import annotations

from collections.abc import Mapping

from nitsum.cost.protocol import CostModel
from nitsum.plan import Lane
from nitsum.step import BatchShape

_LEAST, _MOST = 0.25, 4.0
"""A factor outside these bounds would say that the table is of another machine."""


def factor_of(factors: Mapping[int, float], degree: int) -> float:
    """What is known of the degree, or of the others: where a table is wrong it is mostly the
    machine, and a layout must not seem better or worse for never having been in force."""
    factor = factors.get(degree)
    return _mean(factors) if factor is None else factor


def _mean(factors: Mapping[int, float]) -> float:
    return sum(factors.values()) / len(factors) if factors else 1.0


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
        factor = self.factors.get(lane.group.degree)
        if factor is None:
            factor = _mean(self.factors)
        return self._base_time(lane, batch) * factor

    def move_time(self, num_bytes: int) -> float:
        return self.base.move_time(num_bytes)

    def offload_time(self, num_bytes: int) -> float:
        return self.base.offload_time(num_bytes)

    def observe(self, lane: Lane, batch: BatchShape, seconds: float) -> None:
        """Take note that a step of `batch` took `seconds`."""
        ratio = seconds / self.base.step_time(lane, batch)
        ratio = min(max(ratio, _LEAST), _MOST)
        factor = factor_of(self.factors, lane.degree)
        self.factors[lane.degree] = factor + self.weight * (ratio - factor)
