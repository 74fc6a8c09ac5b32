"""Fairness between tenants of a tier, as virtual token counters define it.

Two tenants who both had requests waiting all through an interval should have received the same
service in it. Service counts a prompt token that was computed as 1 and an answer token as 2, as
in "Fairness in Serving Large Language Models" (Sheng et al., 2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from nitsum.metrics.goodput import Window
from nitsum.metrics.records import RequestRecord

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class ServiceGap(NamedTuple):
    """Over the intervals in which at least two tenants of the tier were backlogged throughout."""

    tier: str
    num_intervals: int
    mean_gap: float
    """Most less least service of an interval, weighted tokens."""
    max_gap: float
    mean_ratio: float
    """Least over most service: 1 is perfectly fair."""


def service_gaps(
    records: Iterable[RequestRecord], window: Window, interval_s: float = 10.0
) -> list[ServiceGap]:
    """One entry per tier that had any such interval."""
    tiers: dict[str, dict[str, list[RequestRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        tiers[record.tier_served][record.tenant].append(record)
    gaps = (_tier_gap(tier, tenants, window, interval_s) for tier, tenants in sorted(tiers.items()))
    return [gap for gap in gaps if gap is not None]


def _tier_gap(
    tier: str, tenants: dict[str, list[RequestRecord]], window: Window, interval_s: float
) -> ServiceGap | None:
    num_intervals = int(window.length_s / interval_s)
    service = {name: _service(records, window, interval_s) for name, records in tenants.items()}
    waits = {name: _waits(records) for name, records in tenants.items()}
    extremes: list[tuple[float, float]] = []
    for i in range(num_intervals):
        start_s = window.start_s + i * interval_s
        backlogged = [n for n in tenants if _covers(waits[n], start_s, start_s + interval_s)]
        if len(backlogged) >= 2:
            received = [service[name].get(i, 0.0) for name in backlogged]
            extremes.append((min(received), max(received)))
    return _gap(tier, extremes) if extremes else None


def _gap(tier: str, extremes: list[tuple[float, float]]) -> ServiceGap:
    gaps = [most - least for least, most in extremes]
    ratios = [least / most if most else 1.0 for least, most in extremes]
    return ServiceGap(tier, len(gaps), sum(gaps) / len(gaps), max(gaps), sum(ratios) / len(ratios))


def _service(records: list[RequestRecord], window: Window, interval_s: float) -> dict[int, float]:
    """Weighted tokens by interval: the prompt when its first token is out, then each token."""
    service: dict[int, float] = defaultdict(float)
    for record in records:
        if not record.token_times:
            continue
        first = int((record.token_times[0] - window.start_s) // interval_s)
        service[first] += PROMPT_WEIGHT * (record.num_prompt - record.num_cached)
        for at_s in record.token_times:
            service[int((at_s - window.start_s) // interval_s)] += OUTPUT_WEIGHT
    return service


def _waits(records: list[RequestRecord]) -> list[tuple[float, float]]:
    """Merged intervals in which at least one request of the tenant waited or was paused."""
    spans: list[tuple[float, float]] = []
    for record in records:
        end_s = record.started_s if record.started_s is not None else record.finished_s
        spans.append((record.arrival_s, float("inf") if end_s is None else end_s))
        spans.extend((a, float("inf") if b is None else b) for a, b in record.paused)
    return merged(spans)


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as disjoint ones in order."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def _covers(spans: list[tuple[float, float]], start_s: float, end_s: float) -> bool:
    return any(a <= start_s and end_s <= b for a, b in spans)
