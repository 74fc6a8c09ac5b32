"""From prefill lanes to the lanes in which answers go on: one request a wave, all the time.

    propose    once a part of the prompt is final, or its last chunk was sent: a lane that decodes
               has a place for it, destination units are reserved
    fill       final blocks follow while later chunks are computed
    hold       the last chunk was sent: no further step of this lane contains the request
    cut over   the last chunk's result is here, so that nobody else of either lane waits for this
               one: what is left and the token row are pulled, the other lane steps
    commit     acknowledged: the source units are let go

Where no lane has a place, the request decodes in the prefill lane until one has. It is tried again
when somebody has ended, and then goes on decoding until nearly all of its KV is copied.

Switches and hand-overs never move at the same time: a switch waits for hand-overs that are cut over
and undoes the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from nitsum.control.courier import Courier
from nitsum.control.migration import Lanes, SequenceMove, Wave
from nitsum.events import AnyEvent, HandedOver
from nitsum.kv.transfer import copy_needs
from nitsum.plan import Group
from nitsum.sequence import SeqState, Sequence


class Relay(Lanes, Protocol):
    """What handing over needs of the engine beyond what a wave needs."""

    def emit(self, event: AnyEvent) -> None: ...

    def handing_over(self) -> Iterable[Sequence]:
        """Those that run in prefill lanes, most urgent first."""
        ...

    def next_groups(self, sequence: Sequence) -> list[Group]:
        """Lanes with a free place in which its answer may go on, the best first."""
        ...

    def hold(self, sequence: Sequence) -> None:
        """No further step of its lane contains it."""
        ...

    def let_go(self, sequence: Sequence) -> None:
        """Its lane steps it again."""
        ...

    def level(self, sequence: Sequence) -> int: ...

    @property
    def num_departures(self) -> int: ...


FILL_BLOCKS = 64
"""Blocks of a request that are reserved and sent a turn."""
RELEASE_BLOCKS = 64
"""Sources of a request that are let go a turn."""
FEW_BLOCKS = 2
"""A request that decodes is held once so few of its blocks are not copied."""


class HandOver:
    """One request on its way."""

    __slots__ = ("courier", "held_s", "move", "src", "wave")

    def __init__(self, move: SequenceMove, wave: Wave, courier: Courier) -> None:
        self.src = move.transfer.src
        self.move = move
        self.wave = wave
        self.courier = courier
        self.held_s: float | None = None
        """Since when no step contains it."""

    @property
    def sequence(self) -> Sequence:
        return self.move.sequence


class HandOvers:
    """All requests on their way from prefill lanes to others."""

    def __init__(self, lanes: Relay, units_under_way: int = 256) -> None:
        self.lanes = lanes
        self.units_under_way = units_under_way
        self.open: dict[Sequence, HandOver] = {}
        self._leaving: list[Courier] = []
        """Of those that are over: their sources are still held."""
        self._failed_at = (-1, -1)
        """Departures and ends when there was no place for somebody."""
        self._num_over = 0

    @property
    def is_idle(self) -> bool:
        return not self.open and not self._leaving

    def on_way_to(self, group: Group) -> int:
        """Requests that have a place there and have not entered it yet."""
        return sum(
            entry.move.dst == group and not entry.wave.is_cut_over for entry in self.open.values()
        )

    def advance(self, *, may_propose: bool) -> None:
        """One turn of work."""
        if may_propose and self._failed_at != self._now_at():
            for sequence in list(self.lanes.handing_over()):
                if sequence not in self.open and not self._offer(sequence):
                    self._failed_at = self._now_at()
                    break
        for entry in list(self.open.values()):
            self._advance(entry)
        for courier in self._leaving:
            courier.let_go(RELEASE_BLOCKS)
        self._leaving = [c for c in self._leaving if c.is_leaving or not c.is_quiet]

    def prompt_sent(self, sequence: Sequence) -> None:
        """The last chunk of its prompt was sent by a prefill lane: it goes on elsewhere."""
        if sequence not in self.open and self._failed_at != self._now_at():
            self._offer(sequence)
        entry = self.open.get(sequence)
        if entry is not None and not entry.wave.is_cut_over:
            self._hold(entry)

    def acknowledge(self, move_id: int, num_bytes: int) -> None:
        for courier in (*(entry.courier for entry in self.open.values()), *self._leaving):
            if courier.acknowledge(move_id, num_bytes):
                return

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or gave up its KV."""
        entry = self.open.get(sequence)
        if entry is not None and not entry.wave.is_cut_over:
            self._undo(entry)

    def cancel(self) -> None:
        """Undo whatever is not cut over; those requests go on where they are."""
        for entry in list(self.open.values()):
            if not entry.wave.is_cut_over:
                self._undo(entry)
                self._let_go(entry)

    # -- inside --

    def _now_at(self) -> tuple[int, int]:
        return self.lanes.num_departures, self._num_over

    def _offer(self, sequence: Sequence) -> bool:
        """Find a place for it, if it is time; False if there is none."""
        size = self.lanes.kv.arena.block_tokens
        is_early = sequence.num_remaining > 1 and sequence.num_computed < size
        if is_early or sequence.has_all_samples:
            return True
        return any(self._begin(sequence, dst) for dst in self.lanes.next_groups(sequence))

    def _begin(self, sequence: Sequence, dst: Group) -> bool:
        courier = Courier(self.lanes.dispatcher, self.units_under_way)
        wave = Wave(self.lanes, courier)
        move = wave.add(sequence, dst)
        if move is None:
            return False
        entry = HandOver(move, wave, courier)
        if not self._has_room(move):
            wave.drop(sequence)
            self._leaving.append(courier)
            return False
        self.open[sequence] = entry
        return True

    def _has_room(self, move: SequenceMove) -> bool:
        """For all blocks of its table, evicting what is only cached."""
        kv = self.lanes.kv
        num_blocks = len(kv.tables[move.sequence.request_id].blocks)
        needs = copy_needs(kv, move.transfer.src, move.dst)
        return all(kv.free_units(rank) >= units * num_blocks for rank, units in needs)

    def _advance(self, entry: HandOver) -> None:
        wave, sequence, is_held = entry.wave, entry.sequence, entry.held_s is not None
        if wave.is_cut_over:
            return self._end(entry) if wave.is_done else None
        if not is_held and sequence.state is not SeqState.RUNNING:
            return self._undo(entry)  # displaced: its place is better given to another
        if is_held and sequence.is_confirmed:
            wave.flush()
            return self._cut_over(entry)
        if wave.fill(entry.move, FILL_BLOCKS) is None:
            self._undo(entry)
            return self._let_go(entry)
        wave.flush()
        if not is_held and sequence.num_remaining <= 1 and wave.num_left(entry.move) <= FEW_BLOCKS:
            self._hold(entry)
        return None

    def _hold(self, entry: HandOver) -> None:
        if entry.held_s is None:
            entry.held_s = self.lanes.now()
            self.lanes.hold(entry.sequence)

    def _cut_over(self, entry: HandOver) -> None:
        entry.wave.cut_over()
        if not entry.wave.totals.moved:  # no room for what it has become
            self._close(entry)
            self._let_go(entry)

    def _end(self, entry: HandOver) -> None:
        wave = entry.wave
        wave.finish()
        self._close(entry)
        times, held_s = wave.times, entry.held_s
        assert held_s is not None
        self.lanes.emit(
            HandedOver(
                at_s=times.done_s,
                request_id=entry.sequence.request_id,
                from_group=entry.src,
                to_group=entry.move.dst,
                bytes_moved=wave.totals.bytes_moved,
                duration_s=times.done_s - times.proposed_s,
                held_s=times.done_s - held_s,
            )
        )

    def _undo(self, entry: HandOver) -> None:
        """Roll back; the copies that are under way are waited for before the sources go."""
        entry.wave.cancel()
        self._close(entry)

    def _close(self, entry: HandOver) -> None:
        del self.open[entry.sequence]
        self._num_over += 1
        self._leaving.append(entry.courier)

    def _let_go(self, entry: HandOver) -> None:
        if entry.held_s is not None and not entry.sequence.is_finished:
            self.lanes.let_go(entry.sequence)
