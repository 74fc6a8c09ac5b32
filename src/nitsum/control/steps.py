"""Step times as the score needs them: many a second, for fractional batches.

A cost model is sampled once, on a grid of batches; context is priced per token. What is lost in
accuracy is far below what the queueing estimate leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import frexp

from nitsum.cost.correct import factor_of
from nitsum.cost.protocol import CostModel
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

_MAX_BIT = 14
_PROBE_CONTEXT = 1 << 16


class StepTimes:
    """Seconds of a step at each degree."""

    def __init__(self, cost: CostModel, degrees: Iterable[int]) -> None:
        self.cost = cost
        self.factors: dict[int, float] = {}
        """Realised over predicted step times, by degree; see `factor_of` for the others."""
        self._degrees = {degree: _Grid(cost, degree) for degree in degrees}

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(self._degrees)

    def seconds(
        self, degree: int, num_decode: float, decode_context: float, prefill: float, before: float
    ) -> float:
        """A step of `num_decode` sequences and `prefill` tokens that attend to `before` each."""
        grid = self._degrees[degree]
        dense_s = grid.dense(num_decode, prefill)
        context_s = decode_context * grid.decode_price_s + prefill * before * grid.prefill_price_s
        return (dense_s + context_s) * factor_of(self.factors, degree)

    def decode_s(self, degree: int) -> float:
        """One sequence of ordinary length."""
        return self._degrees[degree].alone_s * factor_of(self.factors, degree)

    def prefill_s(self, degree: int, prompt_tokens: float, max_batch_tokens: int) -> float:
        """A lone prompt, in chunks."""
        num_steps = -(-prompt_tokens // max_batch_tokens)
        chunk = prompt_tokens / num_steps
        return num_steps * self.seconds(degree, 0.0, 0.0, chunk, prompt_tokens / 2)


class _Grid:
    """Dense times at (0, 1, 2, 4, ... decodes) x (0, 1, 2, 4, ... prefill tokens)."""

    __slots__ = ("alone_s", "decode_price_s", "prefill_price_s", "rows")

    def __init__(self, cost: CostModel, degree: int) -> None:
        lane = Lane(Group(degree, 0))
        counts = [0, *(1 << bit for bit in range(_MAX_BIT + 1))]

        def seconds(num_decode: int, prefill: int, context: int = 0, square: int = 0) -> float:
            samples = max(1, num_decode + (prefill > 0))
            return cost.step_time(lane, BatchShape(num_decode, context, prefill, square, samples))

        decodes = counts[: counts.index(1024) + 1]
        self.rows = [[seconds(num, prefill) for prefill in counts] for num in decodes]
        self.decode_price_s = (seconds(32, 0, _PROBE_CONTEXT) - seconds(32, 0)) / _PROBE_CONTEXT
        self.alone_s = seconds(1, 0, 1024)
        square = 1 << 22
        self.prefill_price_s = (seconds(0, 2048, 0, square) - seconds(0, 2048)) / square

    def dense(self, num_decode: float, prefill: float) -> float:
        rows = self.rows
        i, u = _place(num_decode, len(rows) - 2)
        j, v = _place(prefill, len(rows[0]) - 2)
        near, far = rows[i], rows[i + 1]
        low = near[j] + (near[j + 1] - near[j]) * v
        return low + (far[j] + (far[j + 1] - far[j]) * v - low) * u


def _place(count: float, last: int) -> tuple[int, float]:
    """Index of the knot at or below `count` and the way to the next one; the last segment goes on.

    Knots are 0, 1, 2, 4, 8, ...: a float's exponent is its place.
    """
    if count < 1.0:
        return 0, count
    i = frexp(count)[1]
    if i > last:
        i = last
    knot = 1 << (i - 1)
    return i, (count - knot) / knot
