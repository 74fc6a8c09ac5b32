"""Host memory for KV that had to leave the device: its units, and tables parked in it.

Each rank saves its own units into its own host memory, unit by unit, so a parked table keeps the
layout of the lane it left. Loading reads through the same `moves` as a switch does: any lane can
take the table up, each rank from whichever rank's host memory holds the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nitsum.kv.blocks import Block
from nitsum.kv.moves import moves
from nitsum.plan import Group


class HostPool:
    """Units of one rank's host memory; any free one will do."""

    def __init__(self, num_units: int) -> None:
        self.refs = [0] * num_units
        self._free = list(range(num_units - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int]:
        """Exactly `count` units with one reference each; there must be as many."""
        units = [self._free.pop() for _ in range(count)]
        for unit in units:
            self.refs[unit] = 1
        return units

    def retain(self, unit: int) -> None:
        assert self.refs[unit] > 0, f"host unit {unit} is free"
        self.refs[unit] += 1

    def release(self, unit: int) -> None:
        assert self.refs[unit] > 0, f"host unit {unit} is free already"
        self.refs[unit] -= 1
        if not self.refs[unit]:
            self._free.append(unit)


@dataclass(frozen=True)
class Save:
    """Copy a rank's units into its host memory; sent before the units are used again."""

    rank: int
    units: list[int]
    host_units: list[int]


@dataclass(frozen=True)
class Load:
    """Copy units out of the host memory of some ranks into one rank's arena.

    `load_id` names what to let go of when the copy is done; None if the rank reads its own only.
    """

    rank: int
    sources: dict[int, tuple[list[int], list[int]]]
    """By rank whose host memory is read: (host units, arena units)."""
    load_id: int | None


@dataclass(frozen=True)
class ParkedTable:
    """A request's KV in host memory."""

    group: Group
    """The layout it is in."""
    hashes: tuple[int, ...]
    """Of its leading full blocks, as far as they were shared."""
    units: dict[int, list[int]]
    """Host units by rank, block after block, `units_per_page` each."""
    num_blocks: int


class HostMemory:
    """What is parked on which rank."""

    def __init__(self, num_ranks: int, num_units: int) -> None:
        self.pools = [HostPool(num_units) for _ in range(num_ranks)]
        self.loading: dict[int, list[tuple[int, int]]] = {}
        """(rank, unit) that peers have yet to read, by load."""
        self._next_id = 0

    def park(
        self, group: Group, blocks: Sequence[Block], page_units: int
    ) -> tuple[ParkedTable, list[Save]] | None:
        """Room for a table and the copies that fill it; None if some rank lacks it."""
        count = len(blocks) * page_units
        if any(self.pools[rank].num_free < count for rank in group.ranks):
            return None
        units = {rank: self.pools[rank].alloc(count) for rank in group.ranks}
        saves = [
            Save(rank, [u for block in blocks for u in _page(block, rank, page_units)], units[rank])
            for rank in group.ranks
        ]
        return ParkedTable(group, _leading_hashes(blocks), units, len(blocks)), saves

    def load(
        self, parked: ParkedTable, group: Group, blocks: Sequence[Block], first: int, num_units: int
    ) -> list[Load]:
        """Copies that fill `blocks`, which are the table's from block `first` on."""
        src_count = len(next(iter(parked.units.values()))) // max(1, parked.num_blocks)
        dst_count = max(1, num_units // group.degree)
        sources: dict[int, dict[int, tuple[list[int], list[int]]]] = {r: {} for r in group.ranks}
        for index, block in enumerate(blocks, start=first):
            for move in moves(parked.group, group, num_units):
                host, arena = sources[move.dst_rank].setdefault(move.src_rank, ([], []))
                host.append(parked.units[move.src_rank][index * src_count + move.src_unit])
                page = block.pages[move.dst_rank - group.leader]
                arena.append(page * dst_count + move.dst_unit)
        return [Load(rank, reads, self._hold(rank, reads)) for rank, reads in sources.items()]

    def discard(self, parked: ParkedTable) -> None:
        """The table is not needed any more, but for loads under way."""
        for rank, units in parked.units.items():
            for unit in units:
                self.pools[rank].release(unit)

    def done(self, load_id: int) -> None:
        """The rank has read what it loads."""
        for rank, unit in self.loading.pop(load_id):
            self.pools[rank].release(unit)

    def _hold(self, rank: int, reads: dict[int, tuple[list[int], list[int]]]) -> int | None:
        """Keep what is read out of other ranks' memory. A rank's own is safe without: whatever
        is saved there next comes later in its FIFO."""
        held = [(src, unit) for src, (host, _) in reads.items() if src != rank for unit in host]
        if not held:
            return None
        for src, unit in held:
            self.pools[src].retain(unit)
        self._next_id += 1
        self.loading[self._next_id] = held
        return self._next_id


def _page(block: Block, rank: int, page_units: int) -> range:
    start = block.pages[rank - block.group.leader] * page_units
    return range(start, start + page_units)


def _leading_hashes(blocks: Sequence[Block]) -> tuple[int, ...]:
    hashes: list[int] = []
    for block in blocks:
        if block.hash is None:
            break
        hashes.append(block.hash)
    return tuple(hashes)
