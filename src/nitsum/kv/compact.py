"""Making a large free block out of scattered small ones, by moving pages inside one rank.

Wide lanes use small pages. When they leave a rank, or their requests end, free units may lie
scattered so that no large page fits although there is room. Copies inside a rank are cheap and
ordered by the rank's FIFO, so a page can be moved between any two steps. Where there is nowhere to
move a page to, cached blocks that nobody uses make way.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nitsum.kv.blocks import Block, Relocation, Table
from nitsum.kv.units import UnitPool

if TYPE_CHECKING:
    from nitsum.kv.cache import KvCache


class _Page(NamedTuple):
    block: Block
    place: int
    """Position of the rank in the block's group."""
    start: int
    order: int


class _Region(NamedTuple):
    """`2**order` aligned units, and the pages that must leave before they are one free block."""

    start: int
    order: int
    pages: list[_Page]

    @property
    def units(self) -> range:
        return range(self.start, self.start + (1 << self.order))


Users = dict[Block, list[tuple[Table, int]]]
"""Tables that hold a block, and where in them."""

_BLOCKS_PER_REGION = 64
"""A scan empties one region for this many blocks it looked at: the longer it takes, the fewer there
are, and no scan gives up more than a small share of the cache."""


def compact(cache: KvCache, rank: int, order: int) -> tuple[int, list[Relocation]] | None:
    """Empty the regions of `2**order` units that need the fewest copies, and allocate one.

    Returns its first unit and the copies to send, or None when no region can be emptied.
    """
    blocks = cache.blocks()
    users = _users(cache)
    regions = _regions(cache, rank, order, blocks)
    emptied: list[int] = []
    relocations: list[Relocation] = []
    for region in regions[: max(1, len(blocks) // _BLOCKS_PER_REGION)]:
        copies = _empty(cache, rank, region, users)
        if copies is not None:
            emptied.append(region.start)
            relocations.extend(copies)
    for start in emptied[1:]:
        cache.pools[rank].release(start, 1 << order)
    return (emptied[0], relocations) if emptied else None


def _users(cache: KvCache) -> Users:
    users: Users = defaultdict(list)
    for table in cache.tables.values():
        for index, block in enumerate(table.blocks):
            users[block].append((table, index))
    return users


def _regions(cache: KvCache, rank: int, order: int, blocks: set[Block]) -> list[_Region]:
    """Regions that can be emptied: first those with the least in use, then the longest unused."""
    pool = cache.pools[rank]
    regions = [
        _Region(start, order, pages)
        for start, pages in sorted(_pages_by_region(cache, rank, order, blocks).items())
    ]
    possible = [region for region in regions if _can_empty(pool, region)]
    possible.sort(key=lambda region: _price(cache, region))
    return possible


def _price(cache: KvCache, region: _Region) -> tuple[int, int, int]:
    """Units in use to be moved, then how soon its cached blocks would be evicted anyway."""
    in_use = sum(1 << page.order for page in region.pages if page.block.refs)
    idle = [cache.prefixes.eviction_order(p.block) for p in region.pages if not p.block.refs]
    level, used = max(idle, default=(-1, 0))
    return in_use, level, used


def _pages_by_region(
    cache: KvCache, rank: int, order: int, blocks: set[Block]
) -> dict[int, list[_Page]]:
    """Pages smaller than the wanted region, by the region they lie in."""
    found: dict[int, list[_Page]] = {}
    for block in blocks:
        page_order = cache.arena.page_order(block.group)
        if rank in block.group.ranks and page_order < order:
            place = rank - block.group.leader
            start = block.pages[place] << page_order
            page = _Page(block, place, start, page_order)
            found.setdefault(start >> order << order, []).append(page)
    for pages in found.values():
        pages.sort(key=lambda page: (-page.order, page.start))
    return found


def _can_empty(pool: UnitPool, region: _Region) -> bool:
    """All its units in use belong to movable pages, and belong to one page each."""
    if any(page.block.pins for page in region.pages):
        return False
    counts = pool.refs[region.start : region.start + (1 << region.order)]
    used = sum(1 for count in counts if count)
    return max(counts) <= 1 and used == sum(1 << page.order for page in region.pages)


def _empty(cache: KvCache, rank: int, region: _Region, users: Users) -> list[Relocation] | None:
    """Keep the whole region allocated, its pages moved out; None if they have nowhere to go.

    Cached blocks without users are moved as well, and evicted only if that finds no room.
    """
    pool = cache.pools[rank]
    if not _can_empty(pool, region):
        return None  # pages of a region before it moved in
    copies = _move_out(cache, rank, region, users)
    if copies is not None:
        return copies
    used = [page for page in region.pages if page.block.refs]
    if len(used) == len(region.pages):
        return None
    for page in region.pages:
        if not page.block.refs:
            cache.evict(page.block)
    return _move_out(cache, rank, region._replace(pages=used), users)


def _move_out(cache: KvCache, rank: int, region: _Region, users: Users) -> list[Relocation] | None:
    pool = cache.pools[rank]
    taken = _take_free(pool, region)
    targets: list[int] = []
    for page in region.pages:
        target = pool.alloc(page.order)
        if target is None:
            for done, moved in zip(targets, region.pages, strict=False):
                pool.release(done, 1 << moved.order)
            for unit in taken:
                pool.release(unit, 1)
            return None
        targets.append(target)
    # Each page takes over its target; its old units, still allocated, become the region's.
    for page, target in zip(region.pages, targets, strict=True):
        page.block.pages[page.place] = target >> page.order
        cache.owners[rank][target] = page.block
        for table, index in users.get(page.block, ()):
            table.num_sent = min(table.num_sent, index)  # workers must hear of the new page
    return [
        Relocation(rank, page.start, target, 1 << page.order)
        for page, target in zip(region.pages, targets, strict=True)
    ]


def _take_free(pool: UnitPool, region: _Region) -> list[int]:
    """Claim the free units of a region, so that nothing is moved into it."""
    free = [unit for unit in region.units if not pool.refs[unit]]
    for unit in free:
        claimed = pool.claim(unit, 0)
        assert claimed
    return free
