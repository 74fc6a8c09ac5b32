"""Shares and series over time: what ranks did, how queues grew, what was attained when."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nitsum.metrics.goodput import TargetOf, Window, met
from nitsum.metrics.percentiles import median
from nitsum.metrics.records import RequestRecord, StepRecord


class Series(NamedTuple):
    """Values at times; None where there is nothing to say."""

    name: str
    points: list[tuple[float, float | None]]


class LaneSpan(NamedTuple):
    """From `start_s` to `end_s`, ranks of a group spent `share` of the time in its steps."""

    start_s: float
    end_s: float
    first_rank: int
    degree: int
    share: float


def output_tokens(records: Iterable[RequestRecord], window: Window) -> int:
    """Answer tokens that became known inside the window."""
    return sum(
        bisect_right(r.token_times, window.end_s) - _num_before(r.token_times, window.start_s)
        for r in records
    )


def _num_before(times: Sequence[float], at_s: float) -> int:
    place = bisect_right(times, at_s)
    while place and times[place - 1] == at_s:
        place -= 1
    return place


def prompt_tokens(records: Iterable[RequestRecord], window: Window) -> int:
    """Prompt tokens, cached ones left out, of requests whose first token fell in the window."""
    return sum(
        r.num_prompt - r.num_cached
        for r in records
        if r.token_times and window.holds(r.token_times[0])
    )


def prediction_error(steps: Iterable[StepRecord]) -> float | None:
    """Median relative error of the step times that were predicted; None without any."""
    errors = [
        abs(step.predicted_s / step.seconds - 1.0)
        for step in steps
        if step.predicted_s is not None and step.seconds > 0
    ]
    return median(errors) if errors else None


def bucket_edges(window: Window, num_buckets: int) -> list[float]:
    width = window.length_s / num_buckets
    return [window.start_s + i * width for i in range(num_buckets + 1)]


def queue_depth(
    records: Iterable[RequestRecord], window: Window, num_buckets: int = 120
) -> list[Series]:
    """By tier asked for: requests that waited for their first step, at each bucket's start."""
    changes: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for record in records:
        end_s = record.started_s if record.started_s is not None else record.finished_s
        changes[record.tier_asked].append((record.arrival_s, 1))
        if end_s is not None:
            changes[record.tier_asked].append((end_s, -1))
    edges = bucket_edges(window, num_buckets)
    return [Series(tier, _sampled(sorted(steps), edges)) for tier, steps in sorted(changes.items())]


def _sampled(
    changes: list[tuple[float, int]], edges: list[float]
) -> list[tuple[float, float | None]]:
    points: list[tuple[float, float | None]] = []
    depth = place = 0
    for edge in edges:
        while place < len(changes) and changes[place][0] <= edge:
            depth += changes[place][1]
            place += 1
        points.append((edge, float(depth)))
    return points


def attainment_over_time(
    records: Iterable[RequestRecord], window: Window, target_of: TargetOf, num_buckets: int = 40
) -> list[Series]:
    """By tier asked for: the share of each bucket's arrivals that met their targets."""
    width = window.length_s / num_buckets
    cells: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        bucket = min(int((record.arrival_s - window.start_s) / width), num_buckets - 1)
        cells[record.tier_asked][bucket].append(met(record, target_of(record)))
    centres = [edge + width / 2 for edge in bucket_edges(window, num_buckets)[:-1]]
    return [
        Series(tier, [(at, _share(buckets.get(i))) for i, at in enumerate(centres)])
        for tier, buckets in sorted(cells.items())
    ]


def _share(outcomes: list[bool] | None) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None


def token_rate(steps: Iterable[StepRecord], window: Window, num_buckets: int = 120) -> Series:
    """Answer tokens per second."""
    width = window.length_s / num_buckets
    counts = [0] * num_buckets
    for step in steps:
        if window.holds(step.ended_s):
            bucket = min(int((step.ended_s - window.start_s) / width), num_buckets - 1)
            counts[bucket] += step.num_tokens_out
    edges = bucket_edges(window, num_buckets)
    return Series("tokens/s", [(edges[i], count / width) for i, count in enumerate(counts)])


def lane_spans(
    steps: Iterable[StepRecord], window: Window, num_buckets: int = 160
) -> list[LaneSpan]:
    """Which groups ran steps when: the layout as it was used, bucket by bucket."""
    width = window.length_s / num_buckets
    busy: dict[tuple[int, int, int], float] = defaultdict(float)
    for step in steps:
        if window.holds(step.ended_s):
            bucket = min(int((step.ended_s - window.start_s) / width), num_buckets - 1)
            busy[(bucket, step.group.leader, step.group.degree)] += step.seconds
    edges = bucket_edges(window, num_buckets)
    return [
        LaneSpan(edges[bucket], edges[bucket + 1], rank, degree, min(1.0, seconds / width))
        for (bucket, rank, degree), seconds in sorted(busy.items())
    ]
