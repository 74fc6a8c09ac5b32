"""One wave: a few requests (or cached blocks) move from their lane's layout into another's.

    propose    destination units reserved, source units held; nothing has been sent
    pre-copy   destinations pull what is final, in small messages, while the old lanes keep stepping
    cut over   requests leave their old batch at a step boundary; destinations wait for the sources'
               last step on the device, then pull the tail and the token row; the new lane may step
    commit     all destinations have acknowledged: the source units are let go

Until a request is cut over, dropping it from the wave costs nothing but the reservation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from nitsum.kv.blocks import Block
from nitsum.kv.cache import KvCache
from nitsum.kv.transfer import Transfer, UnitCopy
from nitsum.messages import Pull, RowPull
from nitsum.plan import Group
from nitsum.request import Sequence


class Lanes(Protocol):
    """What a wave needs of the engine."""

    @property
    def kv(self) -> KvCache: ...

    def now(self) -> float: ...

    def send_move(
        self,
        rank: int,
        pulls: list[Pull],
        rows: list[RowPull],
        after: list[tuple[int, int]],
    ) -> int:
        """Queue a `Move` on `rank`; its id comes back with the acknowledgement."""
        ...

    def num_sent(self, rank: int) -> int:
        """Messages sent to `rank` so far, relocations decided until now included."""
        ...

    def num_settled(self, rank: int) -> int:
        """The count after which every relocation decided so far is done on `rank`."""
        ...

    def take_slot(self) -> int | None: ...

    def free_slot(self, slot: int) -> None: ...

    def leave_lane(self, sequence: Sequence) -> None:
        """Take the sequence out of its lane's batch; no further step will contain it."""
        ...

    def enter_lane(self, sequence: Sequence, group: Group) -> None:
        """Let the lane of `group` step the sequence, whose table and slot are set."""
        ...


class Phase(Enum):
    PRECOPY = "precopy"
    TAIL = "tail"
    DONE = "done"


class SequenceMove:
    """One request of a wave."""

    __slots__ = ("dst", "dst_slot", "num_precopied", "sequence", "transfer")

    def __init__(self, sequence: Sequence, dst: Group, dst_slot: int, transfer: Transfer) -> None:
        self.sequence = sequence
        self.dst = dst
        self.dst_slot = dst_slot
        self.transfer = transfer
        self.num_precopied = 0
        """Leading blocks that are final and on their way."""


@dataclass
class WaveTimes:
    proposed_s: float
    cut_over_s: float = 0.0
    done_s: float = 0.0
    propose_s: float = 0.0


@dataclass
class WaveTotals:
    bytes_moved: int = 0
    units_in_place: int = 0
    num_requests: int = 0
    num_cached_blocks: int = 0
    moved: list[str] = field(default_factory=list[str])
    dropped: list[str] = field(default_factory=list[str])


class Wave:
    """The transaction. `advance()` is called once per turn of the engine."""

    def __init__(self, lanes: Lanes, units_per_message: int) -> None:
        self.lanes = lanes
        self.units_per_message = units_per_message
        self.moves: dict[str, SequenceMove] = {}
        self.cached: list[Transfer] = []
        self.phase = Phase.PRECOPY
        self.times = WaveTimes(proposed_s=lanes.now())
        self.totals = WaveTotals()
        self._leaving: list[Transfer] = []
        """Transfers whose sources peers may still be reading."""
        self._leaving_slots: list[int] = []
        self._queued: dict[int, list[UnitCopy]] = defaultdict(list)
        """Copies not sent yet, per destination rank."""
        self._pending: dict[int, int] = {}
        """Moves not acknowledged yet: id -> destination rank."""

    # -- propose --

    def add_sequence(self, sequence: Sequence, dst: Group, level: int) -> bool:
        """Reserve everything one request needs; False, and nothing changed, if it cannot be had."""
        kv = self.lanes.kv
        table = kv.tables[sequence.request_id]
        slot = self.lanes.take_slot()
        if slot is None:
            return False
        transfer = Transfer(kv, table.group, dst)
        if not transfer.extend(table.blocks, level):
            self.lanes.free_slot(slot)
            return False
        move = SequenceMove(sequence, dst, slot, transfer)
        move.num_precopied = sequence.num_computed // kv.arena.block_tokens
        self._queue(transfer.unit_copies(0, move.num_precopied))
        self.moves[sequence.request_id] = move
        return True

    def add_cached(self, src: Group, dst: Group, blocks: Iterable[Block]) -> int:
        """Reserve copies of cached blocks as far as free units allow; how many were taken."""
        kv = self.lanes.kv
        transfer = Transfer(kv, src, dst)
        for block in blocks:
            if block.hash is None:
                continue  # evicted to make an aligned page for one before it
            room = all(kv.pools[r].num_free >= kv.arena.page_units(dst) for r in dst.ranks)
            if not room or not transfer.extend([block], block.level):
                break
        if transfer.copies:
            self.cached.append(transfer)
            self._queue(transfer.unit_copies())
        return len(transfer.copies)

    @property
    def is_empty(self) -> bool:
        return not self.moves and not self.cached

    # -- every turn --

    def advance(self) -> bool:
        """Send what may be sent, move on where all is acknowledged; True when the wave is over."""
        if self.phase is Phase.PRECOPY:
            self._send_queued()
            if self._pending or any(self._queued.values()):
                return False
            self._cut_over()
            self.phase = Phase.TAIL
        if self.phase is Phase.TAIL and not self._pending:
            self._commit()
            self.phase = Phase.DONE
        return self.phase is Phase.DONE

    def acknowledge(self, move_id: int, num_bytes: int) -> bool:
        """A destination has pulled; False if the move is not this wave's."""
        if self._pending.pop(move_id, None) is None:
            return False
        self.totals.bytes_moved += num_bytes
        return True

    def drop(self, sequence: Sequence) -> None:
        """The request ended, or lost its KV, before it was cut over: roll its part back."""
        move = self.moves.pop(sequence.request_id, None)
        if move is not None:
            self.totals.dropped.append(sequence.request_id)
            self._roll_back(move.transfer)
            self.lanes.free_slot(move.dst_slot)

    def cancel(self) -> list[str]:
        """Roll back every request not yet cut over; they go on in their old lanes."""
        if self.phase is not Phase.PRECOPY:
            return []
        dropped = list(self.moves)
        for move in list(self.moves.values()):
            self.drop(move.sequence)
        for transfer in self.cached:
            self._roll_back(transfer)
        self.cached.clear()
        self._queued.clear()
        return dropped

    # -- inside --

    def _queue(self, copies: list[UnitCopy]) -> None:
        for copy in copies:
            self._queued[copy[2]].append(copy)

    def _send_queued(self) -> None:
        """At most one message under way per destination, so that steps run in between."""
        busy = set(self._pending.values())
        for rank, copies in self._queued.items():
            if copies and rank not in busy:
                self._send(rank, copies[: self.units_per_message], [], self._after(copies))
                del copies[: self.units_per_message]

    def _after(self, copies: list[UnitCopy]) -> list[tuple[int, int]]:
        """What a pre-copy waits for. KV that is queued here is final (a cached block was confirmed
        before it was cached), but it may have been relocated on its rank a moment ago."""
        settled = {copy[0]: self.lanes.num_settled(copy[0]) for copy in copies}
        return [(rank, count) for rank, count in sorted(settled.items()) if count]

    def _send(
        self,
        rank: int,
        copies: list[UnitCopy],
        rows: list[RowPull],
        after: list[tuple[int, int]],
    ) -> None:
        by_source: dict[int, Pull] = {}
        for src_rank, src_unit, _, dst_unit in copies:
            pull = by_source.setdefault(src_rank, Pull(src_rank, [], []))
            pull.src_units.append(src_unit)
            pull.dst_units.append(dst_unit)
        others = [entry for entry in after if entry[0] != rank]
        move_id = self.lanes.send_move(rank, list(by_source.values()), rows, others)
        self._pending[move_id] = rank

    def _cut_over(self) -> None:
        self.times.cut_over_s = self.lanes.now()
        tails: dict[int, list[UnitCopy]] = defaultdict(list)
        rows: dict[int, list[RowPull]] = defaultdict(list)
        after: dict[int, set[int]] = defaultdict(set)
        ready = [move for move in list(self.moves.values()) if self._complete(move)]
        for move in ready:
            self.lanes.leave_lane(move.sequence)
            for copy in move.transfer.unit_copies(move.num_precopied):
                tails[copy[2]].append(copy)
            for rank in move.dst.ranks:
                rows[rank].extend(_row_pull(move, rank))
                after[rank].update(move.transfer.src.ranks)
        for rank in sorted(rows):
            waits = [(src, self.lanes.num_sent(src)) for src in sorted(after[rank])]
            self._send(rank, tails[rank], rows[rank], waits)
        for move in ready:
            self._enter(move)
        for transfer in self.cached:
            self.totals.num_cached_blocks += len(transfer.copies)
            self._count_in_place(transfer)
            self.lanes.kv.drop(transfer.hand_over())
            self._leaving.append(transfer)
        self.moves.clear()
        self.cached.clear()

    def _complete(self, move: SequenceMove) -> bool:
        """Reserve room for blocks that grew since; without it the request stays where it is."""
        table = self.lanes.kv.tables[move.sequence.request_id]
        if move.transfer.extend(table.blocks[len(move.transfer.copies) :]):
            return True
        self.drop(move.sequence)
        return False

    def _enter(self, move: SequenceMove) -> None:
        sequence, kv = move.sequence, self.lanes.kv
        self._count_in_place(move.transfer)
        kv.replace_table(sequence.request_id, move.dst, move.transfer.hand_over())
        self._leaving.append(move.transfer)
        if sequence.slot is None:  # admitted, but no step has contained it yet: no row to move
            self.lanes.free_slot(move.dst_slot)
        else:
            self._leaving_slots.append(sequence.slot)
            sequence.slot = move.dst_slot
        sequence.group = move.dst
        self.lanes.enter_lane(sequence, move.dst)
        self.totals.moved.append(sequence.request_id)
        self.totals.num_requests += 1

    def _count_in_place(self, transfer: Transfer) -> None:
        self.totals.units_in_place += sum(copy.num_in_place for copy in transfer.copies)

    def _roll_back(self, transfer: Transfer) -> None:
        """Copies already sent may still be reading the sources; keep those until acknowledged."""
        ids = {id(copy) for block in transfer.copies for copy in block.unit_copies}
        for copies in self._queued.values():
            copies[:] = [copy for copy in copies if id(copy) not in ids]
        transfer.roll_back()
        self._leaving.append(transfer)

    def _commit(self) -> None:
        self.times.done_s = self.lanes.now()
        for transfer in self._leaving:
            transfer.let_go()
        for slot in self._leaving_slots:
            self.lanes.free_slot(slot)
        self._leaving.clear()
        self._leaving_slots.clear()


def _row_pull(move: SequenceMove, rank: int) -> list[RowPull]:
    sequence, src_ranks = move.sequence, move.transfer.src.ranks
    if sequence.slot is None:
        return []
    src_rank = rank if rank in src_ranks else src_ranks[rank % len(src_ranks)]
    num_tokens = max(sequence.num_total, sequence.num_known)
    return [RowPull(src_rank, sequence.slot, move.dst_slot, num_tokens)]
