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
from nitsum.kv.pages import whole_blocks
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

REGIONS_LOOKED_AT = 1024
"""One search looks at so many regions and takes the best of them; the next goes on behind it."""
REGIONS_EMPTIED = 8
"""As many at most are emptied by a search: the rest of them will be wanted soon."""


class Compaction:
    """Empties regions of the pools; remembers how far it has looked."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._next: dict[tuple[int, int], int] = {}
        """By rank and order, the region the next search begins with."""

    def make_room(self, rank: int, order: int) -> tuple[int, list[Relocation]] | None:
        """Empty the regions of `2**order` units that need the fewest copies, and allocate one.

        Returns its first unit and the copies to send, or None when no region can be emptied.
        """
        cache = self._cache
        regions = self._regions(rank, order)
        users = _users(cache, regions)
        emptied: list[int] = []
        relocations: list[Relocation] = []
        for region in regions:
            copies = _empty(cache, rank, region, users)
            if copies is not None:
                emptied.append(region.start)
                relocations.extend(copies)
        for start in emptied[1:]:
            cache.pools[rank].release(start, 1 << order)
        return (emptied[0], relocations) if emptied else None

    def _regions(self, rank: int, order: int) -> list[_Region]:
        """The best of some that can be emptied: the least in use, then the longest unused. Goes on
        past those looked at while none is found."""
        cache, num_regions = self._cache, self._cache.pools[rank].num_units >> order
        first = self._next.get((rank, order), 0)
        found: list[_Region] = []
        for place in range(num_regions):
            if found and place >= REGIONS_LOOKED_AT:
                break
            start = (first + place) % num_regions << order
            region = _region_at(cache, rank, start, order)
            if region is not None:
                found.append(region)
            self._next[rank, order] = (first + place + 1) % num_regions
        found.sort(key=lambda region: _price(cache, region))
        return found[:REGIONS_EMPTIED]


def _region_at(cache: KvCache, rank: int, start: int, order: int) -> _Region | None:
    """The region with what lies in it; None unless that is smaller pages that may be moved."""
    arena, units = cache.arena, range(start, start + (1 << order))

    def takes(block: Block) -> bool:
        is_alive = block.refs > 0 or block.hash is not None
        return is_alive and not block.pins and arena.page_order(block.group) < order

    blocks = whole_blocks(arena, cache.pools[rank], cache.owners[rank], rank, units, takes)
    if blocks is None:
        return None
    pages = [_page(cache, rank, block) for block in blocks]
    pages.sort(key=lambda page: (-page.order, page.start))
    return _Region(start, order, pages)


def _page(cache: KvCache, rank: int, block: Block) -> _Page:
    place, page_order = rank - block.group.leader, cache.arena.page_order(block.group)
    return _Page(block, place, block.pages[place] << page_order, page_order)


def _users(cache: KvCache, regions: list[_Region]) -> Users:
    """Who holds the blocks of these regions."""
    wanted = {page.block for region in regions for page in region.pages if page.block.refs}
    users: Users = defaultdict(list)
    for table in cache.tables.values():
        if wanted.isdisjoint(table.blocks):
            continue
        for index, block in enumerate(table.blocks):
            if block in wanted:
                users[block].append((table, index))
    return users


def _price(cache: KvCache, region: _Region) -> tuple[int, int, int]:
    """Units in use to be moved, then how soon its cached blocks would be evicted anyway."""
    in_use = sum(1 << page.order for page in region.pages if page.block.refs)
    idle = [cache.prefixes.eviction_order(p.block) for p in region.pages if not p.block.refs]
    level, used = max(idle, default=(-1, 0))
    return in_use, level, used


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
