"""Percentiles that say how many samples they rest on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

MIN_SAMPLES_P99 = 1000
"""Below this, a P99 is decided by fewer than ten requests: it is withheld."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` (0..1) of ascending values, linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Iterable[float]) -> float:
    return percentile(sorted(values), 0.5)


class Summary(msgspec.Struct, frozen=True):
    """A distribution in a few numbers; None where there are too few samples."""

    num: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


def summarise(values: Iterable[float | None], *, small_samples: bool = False) -> Summary:
    """Summary of the values that are there; `small_samples` gives a P99 from however few."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return Summary(0)
    enough = small_samples or len(ordered) >= MIN_SAMPLES_P99
    return Summary(
        num=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99) if enough else None,
        max=ordered[-1],
    )
