"""Copying a table into another lane's layout: which blocks, which units, what stays in place.

A transfer reserves everything before a byte moves. Its destination blocks belong to it until it is
handed over; its source blocks are held so that nobody moves or frees them while peers read.
"""

from __future__ import annotations

from collections.abc import Sequence

from nitsum.kv.blocks import Block
from nitsum.kv.cache import KvCache
from nitsum.kv.moves import moves
from nitsum.plan import Group

UnitCopy = tuple[int, int, int, int]
"""(src_rank, src_unit, dst_rank, dst_unit), units counted over the whole arena."""


class BlockCopy:
    """One block on its way into another layout."""

    __slots__ = ("dst", "num_in_place", "src", "unit_copies")

    def __init__(self, src: Block, dst: Block, unit_copies: list[UnitCopy], num_in_place: int):
        self.src = src
        self.dst = dst
        self.unit_copies = unit_copies
        """Empty when the destination layout had the block already."""
        self.num_in_place = num_in_place


class Transfer:
    """Blocks being copied from one layout to another."""

    def __init__(self, cache: KvCache, src: Group, dst: Group) -> None:
        self.cache = cache
        self.src = src
        self.dst = dst
        self.copies: list[BlockCopy] = []

    def extend(self, blocks: Sequence[Block], level: int = 0) -> bool:
        """Reserve destinations for more blocks; False, and none of them, if there is no room."""
        num_before = len(self.copies)
        for block in blocks:
            copy = self._reserve(block, level)
            if copy is None:
                self._undo(num_before)
                return False
            self.copies.append(copy)
        return True

    def hand_over(self) -> list[Block]:
        """The destination blocks, whose references now belong to the caller.

        Every copy must have been sent: from here on they may be relocated.
        """
        for copy in self.copies:
            self.cache.untrack(copy.dst)
            if copy.src.hash is not None and copy.dst.hash is None:
                copy.dst.level = copy.src.level
                self.cache.prefixes.add(copy.dst, copy.src.hash)
        return [copy.dst for copy in self.copies]

    def roll_back(self) -> None:
        """Give up the destination blocks; the source blocks stay held until `let_go`."""
        for copy in self.copies:
            self.cache.unhold(copy.dst)

    def let_go(self) -> None:
        """Every reader is done with the source blocks."""
        for copy in self.copies:
            self.cache.unhold(copy.src)
        self.copies = []

    def unit_copies(self, first: int = 0, last: int | None = None) -> list[UnitCopy]:
        """What must be copied for blocks `first..last`."""
        return [unit for copy in self.copies[first:last] for unit in copy.unit_copies]

    # -- inside --

    def _reserve(self, block: Block, level: int) -> BlockCopy | None:
        cache = self.cache
        known = None
        if block.hash is not None:
            known = cache.prefixes.get(self.dst, block.hash)
        if known is not None:
            cache.retain(known, level)
            return self._hold(BlockCopy(block, known, [], 0))
        cache.hold(block)  # before allocating, which may compact
        dst = self._alloc_dst(block)
        cache.unhold(block)
        if dst is None:
            return None
        copies = list(_unit_copies(cache, block, dst))
        moving = [copy for copy in copies if copy[:2] != copy[2:]]
        return self._hold(BlockCopy(block, dst, moving, len(copies) - len(moving)))

    def _hold(self, copy: BlockCopy) -> BlockCopy:
        self.cache.hold(copy.src)
        self.cache.track(copy.dst)
        return copy

    def _alloc_dst(self, block: Block) -> Block | None:
        """Pages in the destination layout, in place where the rank's own units allow it."""
        cache, order = self.cache, self.cache.arena.page_order(self.dst)
        pages: list[int] = []
        for rank in self.dst.ranks:
            start = self._in_place(block, rank)
            if start is None:
                start = cache.alloc_units(rank, order)
            if start is None:
                for done, page in zip(self.dst.ranks, pages, strict=False):
                    cache.pools[done].release(page << order, 1 << order)
                return None
            pages.append(start >> order)
        return Block(self.dst, pages)

    def _in_place(self, block: Block, rank: int) -> int | None:
        """Where the rank's destination page can lie over its source page; takes references."""
        if rank not in block.group.ranks:
            return None
        arena, pool = self.cache.arena, self.cache.pools[rank]
        src_count, dst_count = arena.page_units(self.src), arena.page_units(self.dst)
        src_start = block.pages[rank - self.src.leader] * src_count
        if dst_count > src_count:
            return self._widen(block, rank, src_start, src_count, dst_count)
        # Narrower or equal: the shard lies inside the old one, its units are a part of the page.
        for move in moves(self.src, self.dst, arena.units_per_block):
            if move.dst_rank == rank and move.dst_unit == 0:
                pool.retain(src_start + move.src_unit, dst_count)
                return src_start + move.src_unit
        raise AssertionError("a destination rank without moves")

    def _widen(
        self, block: Block, rank: int, src_start: int, src_count: int, dst_count: int
    ) -> int | None:
        """The page that grows around its old units, if their place is right and the rest free."""
        start = src_start // dst_count * dst_count
        wanted = next(
            move.dst_unit
            for move in moves(self.src, self.dst, self.cache.arena.units_per_block)
            if move.dst_rank == rank and move.src_rank == rank and move.src_unit == 0
        )
        if src_start - start != wanted:
            return None
        pool = self.cache.pools[rank]
        others = [u for u in range(start, start + dst_count) if not 0 <= u - src_start < src_count]
        if any(pool.refs[unit] for unit in others):
            return None
        for unit in others:
            claimed = pool.claim(unit, 0)
            assert claimed
        pool.retain(src_start, src_count)
        return start

    def _undo(self, num_before: int) -> None:
        for copy in self.copies[num_before:]:
            self.cache.unhold(copy.src)
            self.cache.unhold(copy.dst)
        del self.copies[num_before:]


def _unit_copies(cache: KvCache, src: Block, dst: Block) -> list[UnitCopy]:
    src_count = cache.arena.page_units(src.group)
    dst_count = cache.arena.page_units(dst.group)
    return [
        (
            move.src_rank,
            src.pages[move.src_rank - src.group.leader] * src_count + move.src_unit,
            move.dst_rank,
            dst.pages[move.dst_rank - dst.group.leader] * dst_count + move.dst_unit,
        )
        for move in moves(src.group, dst.group, cache.arena.units_per_block)
    ]
