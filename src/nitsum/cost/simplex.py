"""Nelder-Mead: minimise a function of a few numbers without derivatives."""

from __future__ import annotations

from collections.abc import Callable

Point = tuple[float, ...]
Objective = Callable[[Point], float]


def minimise(objective: Objective, start: Point, *, step: float, num_rounds: int) -> Point:
    """The best point found from `start`, the first simplex having edges of `step`."""
    corners = [start, *(_nudged(start, axis, step) for axis in range(len(start)))]
    simplex = sorted((objective(corner), corner) for corner in corners)
    for _ in range(num_rounds):
        simplex = _improved(objective, simplex)
    return simplex[0][1]


def _nudged(point: Point, axis: int, step: float) -> Point:
    return tuple(x + step if i == axis else x for i, x in enumerate(point))


def _blend(a: Point, b: Point, weight: float) -> Point:
    """The point at `weight` on the line from a (0) to b (1)."""
    return tuple(x + weight * (y - x) for x, y in zip(a, b, strict=True))


def _improved(
    objective: Objective, simplex: list[tuple[float, Point]]
) -> list[tuple[float, Point]]:
    """One round: reflect the worst corner; then expand, contract or shrink. Sorted in and out."""
    worst_value, worst = simplex[-1]
    rest = simplex[:-1]
    centre = tuple(sum(axis) / len(rest) for axis in zip(*(p for _, p in rest), strict=True))

    def candidate(weight: float) -> tuple[float, Point]:
        point = _blend(worst, centre, weight)
        return objective(point), point

    best = candidate(2.0)
    if best[0] < rest[0][0]:
        best = min(best, candidate(3.0))
    elif best[0] >= rest[-1][0]:
        best = min(candidate(1.5), candidate(0.5))
    if best[0] < worst_value:
        return sorted([*rest, best])
    return _shrunk(objective, simplex)


def _shrunk(objective: Objective, simplex: list[tuple[float, Point]]) -> list[tuple[float, Point]]:
    top = simplex[0]
    moved = [_blend(point, top[1], 0.5) for _, point in simplex[1:]]
    return sorted([top, *((objective(point), point) for point in moved)])
