"""Copying blocks into another lane's layout: which units go where, and what stays in place.

A transfer is two columns of blocks. They grow in portions, so that no turn of the engine is long:

    sources   b0 b1 b2 b3 b4 b5     held: peers may read them, nobody may move or free them
    blocks    c0 c1 c2 c3 c4 c5     reserved
              settled |             copies sent: shared by the prefix index, and may be moved

Handed over, `blocks` become the request's table, and its old table's references the transfer's.
Sources are let go, in portions again, when every copy has been made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache as memoized
from typing import NamedTuple

from nitsum.kv.blocks import Block, Held, PageColumns, Table
from nitsum.kv.cache import KvCache
from nitsum.kv.moves import moves
from nitsum.plan import Group
from nitsum.shape import units_per_page

Copies = dict[tuple[int, int], tuple[list[int], list[int]]]
"""(dst_rank, src_rank) -> (units to read, units to write), counted over the whole arenas."""


def join_copies(copies: Copies, more: Copies) -> None:
    """Append `more` to `copies`."""
    for ranks, (sources, places) in more.items():
        known = copies.setdefault(ranks, ([], []))
        known[0].extend(sources)
        known[1].extend(places)


class Transfer:
    """Blocks on their way from one layout to another."""

    def __init__(self, cache: KvCache, src: Group, dst: Group, *, evicts: bool = True) -> None:
        """Without `evicts`, blocks on their way get only what is free as it is."""
        self.cache = cache
        self.src = src
        self.dst = dst
        self.sources: list[Block] = []
        self.blocks: list[Block] = []
        """The destinations; empty once they have been handed over or rolled back."""
        self.num_copied = 0
        """Leading blocks whose copies were asked for."""
        self.num_settled = 0
        """Leading blocks whose copies have been sent."""
        self.evicts = evicts
        self.is_searching = False
        """The last `reserve` found less than was asked for, and may find more in a later turn."""
        self.num_in_place = 0
        """Units that stayed where they were."""
        self._num_registered = 0
        """Leading destination blocks that are in the prefix index."""
        self._pages = PageColumns([[] for _ in dst.ranks], cache.num_relocations)
        """Of the settled blocks."""
        self._source_refs = 1
        """References to each source that are the transfer's."""
        cache.holders[self] = None

    def held(self) -> Iterator[Held]:
        for block in self.sources:
            yield Held(block, self._source_refs, 1)
        for index, block in enumerate(self.blocks):
            yield Held(block, 1, int(index >= self.num_settled))

    # -- reserve --

    def reserve(self, sources: Sequence[Block], *, compacts: bool = True) -> int:
        """Find destinations for more blocks, as far as there is room; for how many there was.

        A block that the destination layout has already is used as it is. With `compacts`, pages
        that are in the way are moved, which takes far longer than all else.
        """
        cache, self.is_searching = self.cache, False
        for block in sources:  # before anything is allocated, which may evict or move
            cache.retain(block)
            block.pins += 1
        known = cache.prefixes.in_layout(self.dst)
        blocks = (
            self._with_known(sources, known, compacts=compacts)
            if known
            else self._place(sources, compacts=compacts)
        )
        for block in blocks:
            block.pins += 1
        count = len(blocks)
        self.sources.extend(sources[:count])
        self.blocks.extend(blocks)
        cache.let_go(sources[count:], 1, keep=True)
        return count

    def _with_known(
        self, sources: Sequence[Block], known: dict[int, Block], *, compacts: bool
    ) -> list[Block]:
        found = [None if b.hash is None else known.get(b.hash) for b in sources]
        for block, copy in zip(sources, found, strict=True):
            if copy is not None:
                self.cache.retain(copy, block.level)
        lacking = [block for block, copy in zip(sources, found, strict=True) if copy is None]
        fresh = iter(self._place(lacking, compacts=compacts))
        blocks: list[Block] = []
        for copy in found:
            block = copy or next(fresh, None)
            if block is None:
                break
            blocks.append(block)
        self.cache.drop(copy for copy in found[len(blocks) :] if copy is not None)
        return blocks

    def _place(self, sources: Sequence[Block], *, compacts: bool) -> list[Block]:
        """Fresh blocks, in place where a rank's own units allow it, as far as there is room."""
        if not sources:
            return []
        cache, order = self.cache, self.cache.arena.page_order(self.dst)
        parts = _layout(self.src, self.dst, cache.arena.units_per_block).parts
        columns: list[list[int]] = []
        count = len(sources)
        for part in parts:
            columns.append(self._starts(part, sources[:count], compacts=compacts))
            count = len(columns[-1])
        for part, column in zip(parts, columns, strict=True):
            for start in reversed(column[count:]):
                cache.pools[part.rank].release(start, 1 << order)
            del column[count:]
        pages = zip(*[[start >> order for start in column] for column in columns], strict=True)
        blocks = [Block(self.dst, list(page)) for page in pages]
        cache.place(blocks)
        return blocks

    def _starts(self, part: _Part, sources: Sequence[Block], *, compacts: bool) -> list[int]:
        """First units of the pages of one destination rank."""
        order = part.dst_units.bit_length() - 1
        if part.inside is not None:
            starts = [b.pages[part.place] * part.src_units + part.inside for b in sources]
            self.cache.pools[part.rank].retain_pages(starts, part.dst_units)
            return starts
        if part.grows_at is None:
            return self._fresh(part.rank, order, len(sources), compacts=compacts)
        grown = [self._widen(part, block, part.grows_at) for block in sources]
        lacking = grown.count(None)
        fresh = iter(self._fresh(part.rank, order, lacking, compacts=compacts))
        starts: list[int] = []
        for start in grown:
            found = next(fresh, None) if start is None else start
            if found is None:
                break
            starts.append(found)
        for start in grown[len(starts) :]:
            if start is not None:
                self.cache.pools[part.rank].release(start, part.dst_units)
        return starts

    def _fresh(self, rank: int, order: int, count: int, *, compacts: bool) -> list[int]:
        if not self.evicts:
            pool = self.cache.pools[rank]
            return pool.alloc_many(order, min(count, pool.num_pages(order))) or []
        starts = self.cache.alloc_pages(rank, order, count, compacts=compacts)
        if len(starts) < count:
            self.is_searching = self.is_searching or self.cache.is_searching(rank, order)
        return starts

    def _widen(self, part: _Part, block: Block, offset: int) -> int | None:
        """The page that grows around its old units, if their place is right and the rest free."""
        start = block.pages[part.place] * part.src_units
        first = start - offset
        if first & (part.dst_units - 1):
            return None
        cache, pool = self.cache, self.cache.pools[part.rank]
        end, last = start + part.src_units, first + part.dst_units
        around = (*range(first, start), *range(end, last))
        if self.evicts:
            if not cache.free_around(part.rank, first, start):
                return None
            if not cache.free_around(part.rank, end, last):
                return None
        elif any(pool.refs[unit] for unit in around):
            return None
        for unit in around:
            claimed = pool.claim(unit, 0)
            assert claimed
        pool.retain(start, part.src_units)
        return first

    # -- copy --

    def copy(self, last: int) -> Copies:
        """What must be copied for the blocks before `last` that was not asked for before."""
        first, self.num_copied = self.num_copied, last
        layout = _layout(self.src, self.dst, self.cache.arena.units_per_block)
        pairs = [
            (source.pages, block.pages)
            for source, block in zip(self.sources[first:last], self.blocks[first:last], strict=True)
            if block.hash is None  # else the layout has it already
        ]
        copies: Copies = {}
        for route in layout.routes:
            units = [s[route.src_place] * layout.src_units + route.src_unit for s, _ in pairs]
            places = [d[route.dst_place] * layout.dst_units + route.dst_unit for _, d in pairs]
            if route.src_rank == route.dst_rank:
                moved = [(u, p) for u, p in zip(units, places, strict=True) if u != p]
                self.num_in_place += len(pairs) - len(moved)
                units, places = [u for u, _ in moved], [p for _, p in moved]
            if units:
                join_copies(copies, {(route.dst_rank, route.src_rank): (units, places)})
        return copies

    def settle(self) -> None:
        """What was asked for has been sent: whoever uses these blocks from here on comes after
        that on every rank."""
        add_copy = self.cache.prefixes.add_copy
        for index in range(self.num_settled, self.num_copied):
            source, block = self.sources[index], self.blocks[index]
            block.pins -= 1
            if block.hash is None:
                if source.hash is None:
                    continue
                block.level = source.level
                if not add_copy(block, source):
                    continue
            if self._num_registered == index:
                self._num_registered = index + 1
        settled = self.blocks[self.num_settled : self.num_copied]
        for place, column in enumerate(self._pages.columns):
            column.extend([block.pages[place] for block in settled])
        self.num_settled = self.num_copied

    # -- end --

    def hand_over(self, request_id: str) -> None:
        """The request, whose table the sources are, continues on the destination blocks.

        Those that no copy was asked for hold nothing yet. All copies must have been sent.
        """
        assert len(self.blocks) == len(self.cache.tables[request_id].blocks), "blocks are missing"
        self.num_copied = len(self.blocks)
        self.settle()
        table = Table(self.dst, self.blocks)
        table.num_registered = self._num_registered
        table.pages = self._pages
        self.cache.replace_table(request_id, table)
        self.blocks = []
        self._source_refs = 2

    def share(self) -> None:
        """Leave the destination blocks, all settled, to the prefix cache."""
        assert self.num_settled == len(self.blocks), "not all blocks are settled"
        self._drop_blocks()

    def roll_back(self) -> None:
        """Give up the destination blocks; the sources stay held until they are let go."""
        for block in self.blocks[self.num_settled :]:
            block.pins -= 1
        self._drop_blocks()

    def let_go(self, count: int, *, keep: bool = True) -> int:
        """No copy reads the sources any more: give up as many of them, the last first; how many.

        With `keep`, those that nobody uses stay cached in their layout.
        """
        portion = self.sources[-count:]
        del self.sources[-count:]
        self.cache.let_go(reversed(portion), self._source_refs, keep=keep)
        if not self.sources:
            self.cache.holders.pop(self, None)
        return len(portion)

    def _drop_blocks(self) -> None:
        blocks, self.blocks = self.blocks, []
        self.cache.drop(reversed(blocks))


def copy_needs(cache: KvCache, src: Group, dst: Group) -> list[tuple[int, int]]:
    """(rank, units of its free memory) that a block on its way may need; 0 where it stays."""
    layout = _layout(src, dst, cache.arena.units_per_block)
    return [(p.rank, 0 if p.inside is not None else p.dst_units) for p in layout.parts]


def free_copies(cache: KvCache, src: Group, dst: Group) -> int:
    """Blocks for which there is free memory as it is."""
    order = cache.arena.page_order(dst)
    needs = copy_needs(cache, src, dst)
    free = [cache.pools[rank].num_pages(order) for rank, units in needs if units]
    return min(free, default=cache.arena.num_units)


def stays_home(cache: KvCache, blocks: Sequence[Block], dst: Group) -> bool:
    """Whether pages of `dst` could grow around the blocks, judged by the first few of them."""
    if not blocks:
        return True
    parts = _layout(blocks[0].group, dst, cache.arena.units_per_block).parts
    return all(
        part.grows_at is not None
        and (block.pages[part.place] * part.src_units - part.grows_at) % part.dst_units == 0
        for part in parts
        if part.inside is None
        for block in blocks[:4]
    )


# --- what depends on the two layouts only ---------------------------------------------------------


class _Part(NamedTuple):
    """How one destination rank gets its page."""

    rank: int
    place: int
    """Position of the rank in the source group, if it is in it."""
    src_units: int
    dst_units: int
    inside: int | None
    """The page lies inside the rank's source page, from this unit on."""
    grows_at: int | None
    """The source page may become this part of the destination page, in place."""


class _Route(NamedTuple):
    """One unit of every block: from where to where, by rank and by position in its group."""

    src_rank: int
    src_place: int
    src_unit: int
    dst_rank: int
    dst_place: int
    dst_unit: int


class _Layout(NamedTuple):
    src_units: int
    dst_units: int
    parts: tuple[_Part, ...]
    routes: tuple[_Route, ...]


@memoized
def _layout(src: Group, dst: Group, num_units: int) -> _Layout:
    src_units = units_per_page(src.degree, num_units)
    dst_units = units_per_page(dst.degree, num_units)
    routes = tuple(
        _Route(
            move.src_rank,
            move.src_rank - src.leader,
            move.src_unit,
            move.dst_rank,
            move.dst_rank - dst.leader,
            move.dst_unit,
        )
        for move in moves(src, dst, num_units)
    )
    parts = tuple(_part(src, rank, src_units, dst_units, routes) for rank in dst.ranks)
    return _Layout(src_units, dst_units, parts, routes)


def _part(
    src: Group, rank: int, src_units: int, dst_units: int, routes: tuple[_Route, ...]
) -> _Part:
    own = [route for route in routes if route.src_rank == rank == route.dst_rank]
    if rank not in src.ranks:
        return _Part(rank, 0, src_units, dst_units, None, None)
    if dst_units <= src_units:
        inside = next(route.src_unit for route in own if route.dst_unit == 0)
        return _Part(rank, rank - src.leader, src_units, dst_units, inside, None)
    grows_at = next(route.dst_unit for route in own if route.src_unit == 0)
    return _Part(rank, rank - src.leader, src_units, dst_units, None, grows_at)
