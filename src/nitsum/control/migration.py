"""One wave: requests move from their lanes' layouts into others', together.

    fill       turn by turn: destination blocks reserved, sources held, and what is final of them on
               its way at once, while the old lanes keep stepping
    cut over   in one turn: requests leave their old batches at a step boundary; destinations wait
               for the sources' last step on the device, then pull the tails and the token rows; the
               new lanes may step. Work in proportion to requests and tails, not to their KV
    commit     all destinations have acknowledged: sources are let go, turn by turn

Until it is cut over, dropping a request from the wave costs nothing but the reservation. Switches
make waves, and so do prefill lanes that hand a request over (`control/handover.py`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from nitsum.control.courier import Courier, Mover
from nitsum.kv.blocks import Block
from nitsum.kv.cache import KvCache
from nitsum.kv.transfer import Copies, Transfer, copy_needs, join_copies
from nitsum.messages import RowPull
from nitsum.plan import Group
from nitsum.sequence import Sequence


class Lanes(Protocol):
    """What a wave needs of the engine."""

    @property
    def kv(self) -> KvCache: ...

    @property
    def dispatcher(self) -> Mover: ...

    def now(self) -> float: ...

    def leave_lane(self, sequence: Sequence) -> None:
        """Take the sequence out of its lane's batch; no further step will contain it."""
        ...

    def enter_lane(self, sequence: Sequence, group: Group) -> None:
        """Let the lane of `group` step the sequence, whose table and slot are set."""
        ...


class SequenceMove(NamedTuple):
    """One request of a wave."""

    sequence: Sequence
    dst: Group
    dst_slot: int
    transfer: Transfer


@dataclass
class WaveTimes:
    proposed_s: float
    filled_s: float = 0.0
    """All its requests were reserved for the first time; 0 while they are not."""
    cut_over_s: float = 0.0
    done_s: float = 0.0


@dataclass
class WaveTotals:
    bytes_moved: int = 0
    units_in_place: int = 0
    moved: list[str] = field(default_factory=list[str])
    dropped: list[str] = field(default_factory=list[str])


class Wave:
    """The transaction: `add` and `fill` turn by turn, `cut_over` once, then wait for `is_done`."""

    def __init__(self, lanes: Lanes, courier: Courier, *, keep_sources: bool = True) -> None:
        """With `keep_sources`, what nobody uses of the sources stays cached in their layouts."""
        self.lanes = lanes
        self.courier = courier
        self.keep_sources = keep_sources
        self.moves: dict[str, SequenceMove] = {}
        self.is_cut_over = False
        self.times = WaveTimes(proposed_s=lanes.now())
        self.totals = WaveTotals()
        self._bytes_before = courier.bytes_moved
        self._outgoing: Copies = {}
        """Pre-copies of this turn, sent by `flush`."""
        self._unsettled: list[Transfer] = []

    # -- fill --

    def add(self, sequence: Sequence, dst: Group) -> SequenceMove | None:
        """Take a request in, with nothing reserved yet but a slot; None without a free slot."""
        slot = self.lanes.dispatcher.take_slot()
        if slot is None:
            return None
        kv = self.lanes.kv
        transfer = Transfer(kv, kv.tables[sequence.request_id].group, dst)
        move = self.moves[sequence.request_id] = SequenceMove(sequence, dst, slot, transfer)
        return move

    def fits(self, sequence: Sequence, dst: Group, num_others: int) -> bool:
        """Whether there is likely to be room for one more, with a block left for each request of
        the wave and `num_others` to go on with. The first may try in any case."""
        if not self.moves:
            return True
        kv = self.lanes.kv
        table = kv.tables[sequence.request_id]
        spare = (len(self.moves) + num_others) * kv.arena.page_units(table.group)
        free = {rank: kv.free_units(rank) - spare for rank in dst.ranks}
        for move in self.moves.values():
            if lacking := self.num_lacking(move):
                for rank, units in copy_needs(kv, move.transfer.src, move.dst):
                    if rank in free:
                        free[rank] -= lacking * units
        needs = copy_needs(kv, table.group, dst)
        return all(free[rank] >= units * len(table.blocks) for rank, units in needs)

    def is_filled(self, move: SequenceMove) -> bool:
        """All its blocks are reserved, and the final ones on their way."""
        num_final = min(self._num_final(move), len(move.transfer.blocks))
        return not self.num_lacking(move) and move.transfer.num_copied >= num_final

    def num_lacking(self, move: SequenceMove) -> int:
        """Blocks of the request that nothing is reserved for."""
        table = self.lanes.kv.tables[move.sequence.request_id]
        return len(table.blocks) - len(move.transfer.sources)

    def num_left(self, move: SequenceMove) -> int:
        """Blocks that hold something and have not been copied: the tail, were it cut over now."""
        size = self.lanes.kv.arena.block_tokens
        return max(0, -(-move.sequence.num_dispatched // size) - move.transfer.num_copied)

    def fill(self, move: SequenceMove, num_blocks: int) -> int | None:
        """Reserve up to `num_blocks` more of the request; how many, or None if there is no room.

        What is final of it leaves with the next `flush`. Final blocks are not reserved before
        their destinations can take them.
        """
        transfer, num_final = move.transfer, self._num_final(move)
        self._copy_final(move, num_final)
        count = min(num_blocks, self.num_lacking(move))
        if count and num_final > len(transfer.sources):
            count = min(count, self._room(move.dst))
        if not count:
            return 0
        first = len(transfer.sources)
        blocks = self.lanes.kv.tables[move.sequence.request_id].blocks[first : first + count]
        # Moving pages out of the way holds everybody up; it is for when nothing else can be done.
        num_found = transfer.reserve(blocks, compacts=len(self.moves) == 1)
        if num_found < count and not transfer.is_searching:
            return None
        self._copy_final(move, num_final)
        return num_found

    def flush(self) -> None:
        """Send the pre-copies of this turn."""
        if self._outgoing:
            self.courier.send_final(self._outgoing)
            self._outgoing = {}
        for transfer in self._unsettled:
            transfer.settle()
        self._unsettled.clear()

    def _num_final(self, move: SequenceMove) -> int:
        """Leading blocks of the request that no step will write any more."""
        return move.sequence.num_computed // self.lanes.kv.arena.block_tokens

    def _copy_final(self, move: SequenceMove, num_final: int) -> None:
        transfer = move.transfer
        count = min(num_final, len(transfer.blocks)) - transfer.num_copied
        if count > 0 and (count := min(count, self._room(move.dst))):
            join_copies(self._outgoing, transfer.copy(transfer.num_copied + count))
            self._unsettled.append(transfer)

    def _room(self, dst: Group) -> int:
        """Blocks that the ranks of `dst` may still be sent in this turn."""
        waiting: dict[int, int] = dict.fromkeys(dst.ranks, 0)
        for (rank, _), (_, places) in self._outgoing.items():
            if rank in waiting:
                waiting[rank] += len(places)
        block_units = self.lanes.kv.arena.page_units(dst)
        return self.courier.room(dst, block_units, max(waiting.values()))

    # -- out of it --

    def drop(self, sequence: Sequence) -> None:
        """The request ended, lost its KV or does not fit: roll its part back."""
        move = self.moves.pop(sequence.request_id, None)
        if move is not None:
            self.totals.dropped.append(sequence.request_id)
            self.flush()  # before its destinations are somebody else's
            move.transfer.roll_back()
            self.courier.leave(move.transfer)
            self.lanes.dispatcher.free_slot(move.dst_slot)

    def cancel(self) -> list[str]:
        """Roll back every request; they go on in their old lanes."""
        dropped = list(self.moves)
        for move in list(self.moves.values()):
            self.drop(move.sequence)
        return dropped

    # -- cut over --

    @property
    def is_done(self) -> bool:
        """Cut over, and all destinations have acknowledged."""
        return self.is_cut_over and self.courier.is_quiet

    def cut_over(self) -> None:
        """Requests that cannot get room for what grew since stay where they are."""
        self.times.cut_over_s = self.lanes.now()
        ready = [move for move in list(self.moves.values()) if self._complete(move)]
        tails: Copies = {}
        rows: dict[int, list[RowPull]] = defaultdict(list)
        after: dict[int, dict[int, int]] = defaultdict(dict)
        for move in ready:
            self.lanes.leave_lane(move.sequence)
            transfer = move.transfer
            join_copies(tails, transfer.copy(transfer.num_copied + self.num_left(move)))
            waits = {src: self._last_write(move, src) for src in transfer.src.ranks}
            for rank in move.dst.ranks:
                rows[rank].extend(_row_pull(move, rank))
                known = after[rank]
                known.update({src: max(num, known.get(src, 0)) for src, num in waits.items()})
        self.courier.send_tails(
            tails,
            rows,
            {
                rank: sorted((src, num) for src, num in waits.items() if num and src != rank)
                for rank, waits in after.items()
            },
        )
        for move in ready:
            self._enter(move)
        self.moves.clear()
        self.is_cut_over = True

    def finish(self) -> None:
        """Note the totals; to be called when it is done."""
        self.times.done_s = self.lanes.now()
        self.totals.bytes_moved = self.courier.bytes_moved - self._bytes_before

    def _last_write(self, move: SequenceMove, rank: int) -> int:
        """The count after which `rank` writes nothing of the request any more. What has no step in
        flight is complete, and need not wait for others' steps."""
        if move.sequence.is_confirmed:
            return self.lanes.dispatcher.num_settled(rank)
        return self.lanes.dispatcher.num_sent(rank)

    def _complete(self, move: SequenceMove) -> bool:
        if not (lacking := self.num_lacking(move)) or self._reserve_rest(move, lacking):
            return True
        self.drop(move.sequence)
        return False

    def _reserve_rest(self, move: SequenceMove, count: int) -> bool:
        blocks: list[Block] = self.lanes.kv.tables[move.sequence.request_id].blocks
        return move.transfer.reserve(blocks[-count:], compacts=False) == count

    def _enter(self, move: SequenceMove) -> None:
        sequence, transfer = move.sequence, move.transfer
        transfer.hand_over(sequence.request_id)
        self.totals.units_in_place += transfer.num_in_place
        if sequence.slot is None:  # admitted, but no step has contained it yet: no row to move
            self.lanes.dispatcher.free_slot(move.dst_slot)
            self.courier.leave(transfer, keep=self.keep_sources)
        else:
            self.courier.leave(transfer, sequence.slot, keep=self.keep_sources)
            sequence.slot = move.dst_slot
        sequence.group = move.dst
        self.lanes.enter_lane(sequence, move.dst)
        self.totals.moved.append(sequence.request_id)


def _row_pull(move: SequenceMove, rank: int) -> list[RowPull]:
    sequence, src_ranks = move.sequence, move.transfer.src.ranks
    if sequence.slot is None:
        return []
    src_rank = rank if rank in src_ranks else src_ranks[rank % len(src_ranks)]
    num_tokens = max(sequence.num_total, sequence.num_known)
    return [RowPull(src_rank, sequence.slot, move.dst_slot, num_tokens)]
