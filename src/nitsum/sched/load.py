"""How much work lanes and ranks have before them: sums kept as requests come and go."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nitsum.plan import Group, Lane
from nitsum.sched.estimate import Work
from nitsum.sequence import Sequence


@dataclass
class _Entry:
    group: Group
    answer_group: Group
    level: int
    num_tokens: int
    prefill_s: float
    answer_s: float


class LoadBook:
    """Estimated seconds of work, by rank and level, and positions by lane.

    Lanes that share ranks share their load. A request counts from the moment it is queued; its
    prompt until its last prefill chunk is sent, its answer until it ends. Where a prefill lane will
    hand it over, its answer counts in the lane that is to have it.
    """

    def __init__(self, num_ranks: int, num_levels: int) -> None:
        self.num_levels = num_levels
        self._up_to = [[0.0] * num_levels for _ in range(num_ranks)]
        """[rank][level]: work of that level and all before it."""
        self._sums_of: dict[Group, list[list[float]]] = {}
        self._tokens: dict[Group, int] = defaultdict(int)
        self._entries: dict[Sequence, _Entry] = {}

    def add(
        self, sequence: Sequence, lane: Lane, level: int, work: Work, then: Lane | None = None
    ) -> None:
        """`then` is the lane that is to have its answer, if that is another one."""
        self.remove(sequence)
        num_tokens = len(sequence.tokens)
        prefill_s = work.prefill_s if sequence.num_remaining > 1 else 0.0
        answer_group = lane.group if then is None else then.group
        entry = _Entry(lane.group, answer_group, level, num_tokens, prefill_s, work.answer_s)
        self._entries[sequence] = entry
        self._tokens[answer_group] += num_tokens
        self._shift(entry, lane.group, prefill_s)
        self._shift(entry, answer_group, work.answer_s)

    def prefilled(self, sequence: Sequence) -> None:
        """The whole prompt has been sent."""
        entry = self._entries.get(sequence)
        if entry is not None and entry.prefill_s:
            self._shift(entry, entry.group, -entry.prefill_s)
            entry.prefill_s = 0.0

    def remove(self, sequence: Sequence) -> None:
        entry = self._entries.pop(sequence, None)
        if entry is not None:
            self._tokens[entry.answer_group] -= entry.num_tokens
            self._shift(entry, entry.group, -entry.prefill_s)
            self._shift(entry, entry.answer_group, -entry.answer_s)

    def backlog_s(self, group: Group, level: int) -> float:
        """Work at the level and before it, on the group's busiest rank."""
        sums = self._sums_of.get(group) or self._sums(group)
        if len(sums) == 1:
            return sums[0][level]
        return max([up_to[level] for up_to in sums])

    def num_tokens(self, group: Group) -> int:
        """Positions, when they were queued, of requests whose answers are the lane's."""
        return self._tokens[group]

    def _sums(self, group: Group) -> list[list[float]]:
        sums = self._sums_of.get(group)
        if sums is None:
            sums = self._sums_of[group] = [self._up_to[rank] for rank in group.ranks]
        return sums

    def _shift(self, entry: _Entry, group: Group, seconds: float) -> None:
        for sums in self._sums(group):
            for level in range(entry.level, self.num_levels):
                sums[level] += seconds
        if not self._entries:
            for sums in self._up_to:
                sums[:] = [0.0] * self.num_levels  # no rounding errors stay
