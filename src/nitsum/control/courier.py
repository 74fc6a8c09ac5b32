"""Copies under way between ranks: how many a rank may be sent, and when sources may be let go.

A pre-copy runs beside steps on a GPU and between them on a CPU, so what a destination has before
it is bounded. Sources stay held until everything that was under way when they were given up has
been acknowledged, and are then let go a few blocks a turn.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple, Protocol

from nitsum.kv.transfer import Copies, Transfer
from nitsum.messages import Pull, RowPull
from nitsum.plan import Group


class Mover(Protocol):
    """What carrying KV needs of the engine."""

    def send_move(
        self,
        rank: int,
        pulls: list[Pull],
        rows: list[RowPull],
        after: list[tuple[int, int]],
    ) -> int:
        """Queue a `Move` on `rank`; its id, larger than all before it, comes back with the
        acknowledgement."""
        ...

    def num_settled(self, rank: int) -> int:
        """The count after which every relocation decided so far is done on `rank`."""
        ...

    def num_sent(self, rank: int) -> int:
        """Messages sent to `rank` so far, relocations decided until now included."""
        ...

    def take_slot(self) -> int | None: ...

    def free_slot(self, slot: int) -> None: ...


class _Leaving(NamedTuple):
    """Sources that copies up to `last_id` may be reading, and the slot whose row they may read."""

    transfer: Transfer
    slot: int | None
    keep: bool
    last_id: int


class Courier:
    """Sends copies and remembers what is under way."""

    def __init__(self, mover: Mover, units_under_way: int) -> None:
        """`units_under_way`: most units of pre-copies that one rank has before it."""
        self.mover = mover
        self.units_under_way = units_under_way
        self.bytes_moved = 0
        self._pending: dict[int, tuple[int, int]] = {}
        """Destination rank and units of moves not acknowledged yet, by id, in order."""
        self._num_units: dict[int, int] = defaultdict(int)
        """Units under way by destination rank."""
        self._last_id = 0
        self._leaving: deque[_Leaving] = deque()

    @property
    def is_quiet(self) -> bool:
        """Everything that was sent has been acknowledged."""
        return not self._pending

    @property
    def is_leaving(self) -> bool:
        """Some sources have not been let go yet."""
        return bool(self._leaving)

    def wants_more(self, group: Group) -> bool:
        """Every rank of the group can be sent at least an eighth of what may be under way to it."""
        before = max(self._num_units[rank] for rank in group.ranks)
        return 8 * before <= 7 * self.units_under_way

    def room(self, group: Group, block_units: int, num_waiting: int = 0) -> int:
        """Blocks of `block_units` units that every rank of the group may be sent now, beyond
        `num_waiting` units; one in any case if it has nothing before it."""
        before = num_waiting + max(self._num_units[rank] for rank in group.ranks)
        room = (self.units_under_way - before) // block_units
        return max(0, room) if before else max(1, room)

    def send_final(self, copies: Copies) -> None:
        """Pre-copy KV that is final. It may have been relocated on its rank a moment ago."""
        for rank, pulls in _by_destination(copies).items():
            sources = sorted(pull.src_rank for pull in pulls)
            settled = [(src, self.mover.num_settled(src)) for src in sources if src != rank]
            self.send(rank, pulls, [], [entry for entry in settled if entry[1]])

    def send_tails(
        self,
        copies: Copies,
        rows: dict[int, list[RowPull]],
        after: dict[int, list[tuple[int, int]]],
    ) -> None:
        """To each rank of `after`: what is left of its requests, and their rows."""
        pulls = _by_destination(copies)
        for rank in sorted(after):
            self.send(rank, pulls.get(rank, []), rows.get(rank, []), after[rank])

    def send(
        self, rank: int, pulls: list[Pull], rows: list[RowPull], after: list[tuple[int, int]]
    ) -> None:
        num_units = sum(len(pull.dst_units) for pull in pulls)
        move_id = self.mover.send_move(rank, pulls, rows, after)
        self._pending[move_id] = (rank, num_units)
        self._num_units[rank] += num_units
        self._last_id = move_id

    def acknowledge(self, move_id: int, num_bytes: int) -> bool:
        """A destination has pulled; False if the move is none of these."""
        entry = self._pending.pop(move_id, None)
        if entry is None:
            return False
        rank, num_units = entry
        self._num_units[rank] -= num_units
        self.bytes_moved += num_bytes
        return True

    # -- sources --

    def leave(self, transfer: Transfer, slot: int | None = None, *, keep: bool = True) -> None:
        """Let go of the sources, and free the slot, when what is under way now has arrived.

        With `keep`, sources that nobody uses stay cached.
        """
        self._leaving.append(_Leaving(transfer, slot, keep, self._last_id))

    def let_go(self, num_blocks: int) -> None:
        """Give up to `num_blocks` sources back that nobody reads any more."""
        oldest = next(iter(self._pending), None)
        while num_blocks > 0 and self._leaving:
            leaving = self._leaving[0]
            if oldest is not None and oldest <= leaving.last_id:
                return
            if leaving.slot is not None:
                self.mover.free_slot(leaving.slot)
                self._leaving[0] = leaving._replace(slot=None)
            num_blocks -= max(1, leaving.transfer.let_go(num_blocks, keep=leaving.keep))
            if not leaving.transfer.sources:
                self._leaving.popleft()


def _by_destination(copies: Copies) -> dict[int, list[Pull]]:
    pulls: dict[int, list[Pull]] = defaultdict(list)
    for (dst_rank, src_rank), (sources, places) in sorted(copies.items()):
        pulls[dst_rank].append(Pull(src_rank, sources, places))
    return pulls
