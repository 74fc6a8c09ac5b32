"""Monotone piecewise-linear functions: interpolation and isotonic regression."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from nitsum.errors import ConfigError


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The line through the two knots around `x`; outside, the outermost line goes on.

    With one knot the function is constant. Below the first knot it never falls under zero.
    """
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    low = xs[i - 1]
    y = ys[i - 1] + (ys[i] - ys[i - 1]) * (x - low) / (xs[i] - low)
    return y if y > 0.0 else 0.0


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The non-decreasing sequence nearest to `values` in weighted least squares.

    Pool adjacent violators: neighbours that fall are replaced by their weighted mean.
    """
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            pool = _pooled(pools.pop(), pool)
        pools.append(pool)
    return [mean for mean, _, count in pools for _ in range(count)]


def _pooled(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    weight = a[1] + b[1]
    mean = (a[0] * a[1] + b[0] * b[1]) / weight if weight else (a[0] + b[0]) / 2
    # Rounding must not lift the mean above what was pooled into it.
    return min(mean, a[0]), weight, a[2] + b[2]


def lower_envelope(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """For each x, the least y at that x or beyond; x ascending.

    Removes delays from times that are known to grow with x.
    """
    envelope: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        envelope.append((x, min(y, envelope[-1][1]) if envelope else y))
    return envelope[::-1]


class Curve(msgspec.Struct, frozen=True):
    """Seconds over a count, by knots."""

    knots: list[tuple[float, float]]
    """(count, seconds), both ascending."""
    measured: bool = True
    """False: derived from a neighbour by rule, not from a measurement of its own."""

    def __post_init__(self) -> None:
        xs = [x for x, _ in self.knots]
        ys = [y for _, y in self.knots]
        if not xs or ys != sorted(ys) or xs != sorted(set(xs)):
            raise ConfigError("A curve needs knots with rising counts and times that never fall.")

    def seconds(self, count: float) -> float:
        return _on_knots(self.knots, count)


def _on_knots(knots: Sequence[tuple[float, float]], x: float) -> float:
    """`interpolate` on pairs, and constant below the first knot: that is a latency."""
    if x <= knots[0][0] or len(knots) == 1:
        return knots[0][1]
    i = min(bisect_right(knots, (x, float("inf"))), len(knots) - 1)
    (x0, y0), (x1, y1) = knots[i - 1], knots[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def fit_curve(points: Sequence[tuple[float, float]], knots: Sequence[float]) -> Curve:
    """A curve through the lower envelope of `points` at those `knots` that lie in its range."""
    envelope = lower_envelope(points)
    xs, ys = [x for x, _ in envelope], [y for _, y in envelope]
    inside = [x for x in knots if xs[0] <= x <= xs[-1]]
    chosen = sorted({xs[0], *inside, xs[-1]})
    return Curve([(x, interpolate(xs, ys, x)) for x in chosen])
