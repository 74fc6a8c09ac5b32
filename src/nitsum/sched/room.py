"""Room in the KV arena: who has to make way for whom, and where its KV goes.

Paused sequences go before running ones, the lowest tier first, the latest arrival of a tier first.
KV goes to host memory while there is room in it, and is dropped otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nitsum.request import SeqState, Sequence
from nitsum.sched.composed import Composed, Preemption

if TYPE_CHECKING:
    from nitsum.sched.lane import LaneScheduler


class Room:
    """Finds memory for the sequences of one lane."""

    def __init__(self, lane: LaneScheduler) -> None:
        self.lane = lane
        self.kv = lane.kv

    def admit(self, sequence: Sequence, rank: int, step: Composed) -> bool:
        """Blocks for all its tokens. Running sequences of its own level are left alone."""
        num_tokens = len(sequence.tokens)
        if sequence.num_restarts and not self._has_headroom(num_tokens):
            return False
        while not self.kv.grow(sequence.request_id, num_tokens):
            if not self._make_way(sequence, rank, step):
                return False
        return True

    def restore(self, sequence: Sequence, rank: int, step: Composed) -> bool:
        """Its KV back from host memory, into this lane's layout."""
        if not self._has_headroom(sequence.num_total + 1):
            return False
        group = self.lane.lane.group
        level = self.lane.setting.tiers[sequence.tier].level
        while not self.kv.restore(sequence.request_id, group, level):
            if not self._make_way(sequence, rank, step):
                return False
        return True

    def grow(self, sequence: Sequence, num_tokens: int, step: Composed) -> bool:
        """Blocks for a running sequence to go on; later ones of its level make way, too."""
        while not self.kv.grow(sequence.request_id, num_tokens):
            level = self.lane.setting.level(sequence)
            if not self._make_way(sequence, level, step, growing=True):
                return False
        return True

    def yield_kv(self, victim: Sequence, by: Sequence, step: Composed) -> None:
        """The victim's device memory is free after this, and it is not part of the step."""
        lane = self._lane_of(victim)
        step.take_out(victim)
        kept = lane.rules.keeps_kv and self.kv.offload(victim.request_id)
        if kept and victim.state is SeqState.RUNNING:
            lane.pause(victim, by, step)
        elif not kept:
            lane.leave(victim)
            victim.wait_from_s = max(victim.wait_from_s, step.now)
            self.kv.close(victim.request_id)
        step.preempted.append(Preemption(victim, by, kept))

    def is_moving(self, sequence: Sequence) -> bool:
        """Peers may be reading its KV: giving it up would free nothing now."""
        return any(block.pins for block in self.kv.tables[sequence.request_id].blocks)

    # -- inside --

    def _make_way(
        self, asking: Sequence, rank: int, step: Composed, *, growing: bool = False
    ) -> bool:
        """The next victim's room is free; False if there is none."""
        victim = self._victim(asking, rank, growing)
        if victim is None:
            return False
        self.yield_kv(victim, asking, step)
        return True

    def _has_headroom(self, num_tokens: int) -> bool:
        """Whether work that comes back would not have to leave at once: every running sequence
        may need a block soon. With nothing running there is nothing to wait for."""
        lane = self.lane
        if not lane.num_running:
            return True
        needed = -(-num_tokens // self.kv.arena.block_tokens) + lane.num_running
        return self.kv.free_blocks(lane.lane.group) >= needed

    def _victim(self, asking: Sequence, rank: int, growing: bool) -> Sequence | None:
        lanes = (self.lane, *self.lane.neighbours) if self.lane.rules.displaces else (self.lane,)
        for lane in lanes:
            found = self._last(_held_paused(lane), asking, rank, same_level=lane is self.lane)
            if found is not None:
                return found
        if not (growing or self.lane.rules.displaces):
            return None
        for lane in lanes:
            same_level = growing and lane is self.lane
            found = self._last(_running(lane), asking, rank, same_level=same_level)
            if found is not None:
                return found
        return None

    def _last(
        self,
        levels: Iterable[tuple[int, Iterable[Sequence]]],
        asking: Sequence,
        rank: int,
        *,
        same_level: bool,
    ) -> Sequence | None:
        """The latest of the lowest level that ranks behind the one that asks and is not moving."""
        for level, sequences in levels:
            if level < rank or (level == rank and not same_level):
                return None
            behind = [
                sequence
                for sequence in sequences
                if sequence is not asking
                and not sequence.promoted
                and (level > rank or _place(sequence) > _place(asking))
                and not self.is_moving(sequence)
            ]
            if behind:
                return max(behind, key=_place)
        return None

    def _lane_of(self, sequence: Sequence) -> LaneScheduler:
        for lane in (self.lane, *self.lane.neighbours):
            if lane.lane.group == sequence.group:
                return lane
        raise AssertionError(f"{sequence.request_id} is on another lane")


def _place(sequence: Sequence) -> tuple[int, float, str]:
    request = sequence.request
    return (request.order, request.arrival_s, request.request_id)


def _held_paused(lane: LaneScheduler) -> Iterator[tuple[int, list[Sequence]]]:
    tables = lane.kv.tables
    for level in reversed(lane.levels):
        yield level, [s for s in lane.paused[level] if s.request_id in tables]


def _running(lane: LaneScheduler) -> Iterator[tuple[int, Iterable[Sequence]]]:
    for level in reversed(lane.levels):
        yield level, lane.running[level]
