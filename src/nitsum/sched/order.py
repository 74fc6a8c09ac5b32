"""In what order the prompts under way get their share of a step.

promoted   waited as long as their tier allows
owed       of a tier that has a turn coming; both only get a part of each step
by tier    1. those that can be on time: promised ones, then the others, least slack first; among
              them late calls of chains, in the place their chain gives them
           2. those that go back so that the others are on time
           3. those that are late, by arrival
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nitsum.sched.composed import Composed
from nitsum.sched.relegation import Job, given_up
from nitsum.sequence import Sequence

if TYPE_CHECKING:
    from nitsum.sched.lane import LaneScheduler

SETTLED_S = 2.0
"""The pace of prefills is a mean over about this time."""


class PrefillPace:
    """How fast prompts of each level get on when there is more to do than fits into a step."""

    def __init__(self, num_levels: int, tokens_per_s: float) -> None:
        self.tokens_per_s = [tokens_per_s] * num_levels
        """What a level can use: all but what higher levels took."""

    def note_step(self, prefill_tokens: list[int], seconds: float) -> None:
        """A step that left prompts waiting took so many tokens of each level."""
        weight = min(1.0, seconds / SETTLED_S)
        left = sum(prefill_tokens)
        for level, taken in enumerate(prefill_tokens):
            mean = self.tokens_per_s[level]
            self.tokens_per_s[level] = max(1.0, mean + weight * (left / seconds - mean))
            left -= taken


def in_order(
    lane: LaneScheduler, step: Composed, prefills: list[list[Sequence]]
) -> tuple[list[Sequence], Iterator[Sequence]]:
    """Those that go first but get only a part of the step, and all others, by urgency.

    `prefills` are by level. A step takes a few of many, so only what is asked for gets sorted.
    """
    ahead: list[Sequence] = []
    by_level = list(prefills)
    for level, sequences in enumerate(prefills):
        if sequences and lane.shares.protects(level):
            ahead += sequences
            by_level[level] = []
        elif lane.num_promoted:
            ahead += [s for s in sequences if s.promoted]
            by_level[level] = [s for s in sequences if not s.promoted]
    ahead.sort(key=lambda sequence: (not sequence.promoted, sequence.latest_start_s))
    return ahead, _by_level(lane, step, by_level)


def _by_level(
    lane: LaneScheduler, step: Composed, by_level: list[list[Sequence]]
) -> Iterator[Sequence]:
    if not lane.rules.slack:
        for sequences in by_level:
            yield from sorted(sequences, key=_by_arrival)
        return
    before_s = step.start_s
    for level, sequences in enumerate(by_level):
        if not sequences:
            continue
        tokens_per_s = lane.prefill_pace.tokens_per_s[level]
        if len(sequences) == 1:
            yield sequences[0]
        else:
            yield from sorted(sequences, key=_urgency(sequences, before_s, tokens_per_s))
        before_s += sum(s.num_remaining for s in sequences) / tokens_per_s


def _urgency(
    sequences: list[Sequence], start_s: float, tokens_per_s: float
) -> Callable[[Sequence], tuple[int, bool, int, float]]:
    """Sort key of one level's prompts: class, promised or not, the client's order, time."""
    late = {s for s in sequences if start_s > s.first_due_s}
    jobs = [
        Job(s.first_due_s, s.num_remaining / tokens_per_s, s, s.chain_start_s is not None)
        for s in sequences
        if s.pace_s is not None and s not in late
    ]
    back = given_up(jobs, start_s) if len(jobs) > 1 else set[Sequence]()

    def key(sequence: Sequence) -> tuple[int, bool, int, float]:
        order, is_open = sequence.request.order, not sequence.promised
        if sequence not in late:
            return (1 if sequence in back else 0, is_open, order, sequence.latest_start_s)
        if sequence.chain_start_s is not None:
            return (0, is_open, order, sequence.chain_start_s)
        return (2, False, order, sequence.request.arrival_s)

    return key


def _by_arrival(sequence: Sequence) -> float:
    return sequence.request.arrival_s
