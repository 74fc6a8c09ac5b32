"""What changing plans could gain at most: loads that a layout sustains, and two phases in turns.

No controller, no price of a change: a ceiling by the cost model, to know beforehand whether a
setting is one in which a layout that follows the load can pay at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from nitsum.control.load import Load, scaled
from nitsum.control.score import Scorer
from nitsum.plan import Plan

IN_TIME = 0.95
"""Share of the requests that a sustained load is served in time."""
_LEAST, _MOST = 1e-4, 1e4
_CLOSE = 1.005
_NUM_SHARES = 200


def sustained(scorer: Scorer, plan: Plan, load: Load) -> float:
    """The largest factor of `load` under which 95% are in time; 0 when none is."""

    def holds(factor: float) -> bool:
        found = scaled(load, factor)
        asked = sum(tier.rate_per_s for tier in found)
        return scorer.score(plan, found).feasible_per_s >= IN_TIME * asked

    low, high = _LEAST, _MOST
    if not holds(low):
        return 0.0
    while high / low > _CLOSE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def most_gain(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two phases in turns, over the best single layout; both list what each layout sustains.

    Each phase comes with as much as its best layout sustains, and lasts for the share of the time
    at which changing gains most. 1 is no gain; `inf` never happens, as some layout serves each.
    """
    a = [value / max(first) for value in first]
    b = [value / max(second) for value in second]
    shares = [number / _NUM_SHARES for number in range(_NUM_SHARES + 1)]
    return 1.0 / min(max(w * x + (1.0 - w) * y for x, y in zip(a, b, strict=True)) for w in shares)
