"""What each rank did in a window: in steps, at work in them, reading, multiplying."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from nitsum.metrics.fairness import merged
from nitsum.metrics.goodput import Window
from nitsum.metrics.records import StepRecord
from nitsum.step import BatchShape, StepWork

WorkOf = Callable[[int, BatchShape], StepWork]
"""(degree, shape) -> the least that one rank of the lane has to do."""


class RankUse(msgspec.Struct, frozen=True, kw_only=True):
    """One rank."""

    step_share: float
    """Of the window, inside some step."""
    busy_share: float
    """Without waiting for peers, as far as ranks can tell; gaps between the kernels of a step are
    part of it."""
    read_bytes_per_s: float | None = None
    """At least: weights once a step, the KV of decodes. None where the model is not known."""
    flops_per_s: float | None = None


@dataclass
class _Rank:
    spans: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    busy_s: float = 0.0
    num_bytes: float = 0.0
    flops: float = 0.0

    def add(self, step: StepRecord, rank: int, span: tuple[float, float], work: StepWork) -> None:
        """What lies outside the window counts in proportion."""
        self.spans.append(span)
        share = (span[1] - span[0]) / step.seconds
        self.busy_s += share * step.busy_s(rank)
        self.num_bytes += share * work.num_bytes
        self.flops += share * work.flops

    def use(self, length_s: float, *, knows_work: bool) -> RankUse:
        step_share = sum(b - a for a, b in merged(self.spans)) / length_s
        return RankUse(
            step_share=step_share,
            busy_share=min(step_share, self.busy_s / length_s),
            read_bytes_per_s=self.num_bytes / length_s if knows_work else None,
            flops_per_s=self.flops / length_s if knows_work else None,
        )


def rank_use(
    steps: Iterable[StepRecord], window: Window, work_of: WorkOf | None = None
) -> list[RankUse]:
    """By rank that had a step, in the window or not; empty where steps are not known, as to a
    client."""
    ranks: dict[int, _Rank] = defaultdict(_Rank)
    num_ranks = 0
    for step in steps:
        if step.seconds > 0.0:
            num_ranks = max(num_ranks, step.group.ranks[-1] + 1)
        span = max(window.start_s, step.ended_s - step.seconds), min(window.end_s, step.ended_s)
        if span[0] < span[1]:
            work = work_of(step.group.degree, step.shape) if work_of else StepWork(0, 0)
            for rank in step.group.ranks:
                ranks[rank].add(step, rank, span, work)
    if window.length_s <= 0:
        return []
    return [
        ranks[rank].use(window.length_s, knows_work=work_of is not None)
        for rank in range(num_ranks)
    ]


def mean_of(ranks: list[RankUse], figure: str) -> float | None:
    """Over the ranks; None without any that has it."""
    values = [value for rank in ranks if (value := getattr(rank, figure)) is not None]
    return sum(values) / len(values) if values else None
