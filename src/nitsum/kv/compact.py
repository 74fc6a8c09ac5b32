"""Making a large free block out of scattered small ones, by moving pages inside one rank.

Wide lanes use small pages. When they leave a rank, or their requests end, free units may lie
scattered so that no large page fits although there is room. Copies inside a rank are cheap and
ordered by the rank's FIFO, so a page can be moved between any two steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nitsum.kv.blocks import Block, Relocation
from nitsum.kv.units import UnitPool

if TYPE_CHECKING:
    from nitsum.kv.cache import KvCache


class _Page(NamedTuple):
    block: Block
    place: int
    """Position of the rank in the block's group."""
    start: int
    order: int


_REGIONS_AT_ONCE = 16  # one scan over all blocks pays for several pages


def compact(cache: KvCache, rank: int, order: int) -> tuple[int, list[Relocation]] | None:
    """Empty the regions of `2**order` units that need the fewest copies, and allocate one.

    Returns its first unit and the copies to send, or None when no region can be emptied.
    """
    pool = cache.pools[rank]
    emptied: list[int] = []
    relocations: list[Relocation] = []
    for start, pages in _regions(cache, rank, order)[:_REGIONS_AT_ONCE]:
        if not _can_empty(pool, start, order, pages):
            continue  # pages of a region before it moved in
        copies = _empty(cache, rank, start, order, pages)
        if copies is None:
            break
        emptied.append(start)
        relocations.extend(copies)
    for start in emptied[1:]:
        pool.release(start, 1 << order)
    return (emptied[0], relocations) if emptied else None


def _regions(cache: KvCache, rank: int, order: int) -> list[tuple[int, list[_Page]]]:
    """Regions that can be emptied, cheapest first: (first unit, pages to move out)."""
    pool = cache.pools[rank]
    found: list[tuple[int, int, list[_Page]]] = []
    for start, pages in sorted(_pages_by_region(cache, rank, order).items()):
        if _can_empty(pool, start, order, pages):
            found.append((sum(1 << page.order for page in pages), start, pages))
    found.sort(key=lambda entry: entry[:2])
    return [(start, pages) for _, start, pages in found]


def _pages_by_region(cache: KvCache, rank: int, order: int) -> dict[int, list[_Page]]:
    """Pages smaller than the wanted region, by the region they lie in."""
    found: dict[int, list[_Page]] = {}
    for block in cache.blocks():
        page_order = cache.arena.page_order(block.group)
        if rank in block.group.ranks and page_order < order:
            place = rank - block.group.leader
            start = block.pages[place] << page_order
            page = _Page(block, place, start, page_order)
            found.setdefault(start >> order << order, []).append(page)
    for pages in found.values():
        pages.sort(key=lambda page: (-page.order, page.start))
    return found


def _can_empty(pool: UnitPool, start: int, order: int, pages: list[_Page]) -> bool:
    """All its units in use belong to movable pages, and belong to one page each."""
    if any(page.block.pins for page in pages):
        return False
    used = sum(1 for count in pool.refs[start : start + (1 << order)] if count)
    shared = any(count > 1 for count in pool.refs[start : start + (1 << order)])
    return not shared and used == sum(1 << page.order for page in pages) < 1 << order


def _empty(
    cache: KvCache, rank: int, start: int, order: int, pages: list[_Page]
) -> list[Relocation] | None:
    """Move all pages out and keep the whole region allocated; None, and no change, if no room."""
    pool = cache.pools[rank]
    taken = _take_free(pool, start, order)
    targets: list[int] = []
    for page in pages:
        target = pool.alloc(page.order)
        if target is None:
            for done, moved in zip(targets, pages, strict=False):
                pool.release(done, 1 << moved.order)
            for unit in taken:
                pool.release(unit, 1)
            return None
        targets.append(target)
    # Each page takes over its target; its old units, still allocated, become the region's.
    for page, target in zip(pages, targets, strict=True):
        page.block.pages[page.place] = target >> page.order
        _mark_unsent(cache, page.block)
    return [
        Relocation(rank, page.start, target, 1 << page.order)
        for page, target in zip(pages, targets, strict=True)
    ]


def _take_free(pool: UnitPool, start: int, order: int) -> list[int]:
    """Claim the free units of a region, so that nothing is moved into it."""
    free = [unit for unit in range(start, start + (1 << order)) if not pool.refs[unit]]
    for unit in free:
        claimed = pool.claim(unit, 0)
        assert claimed
    return free


def _mark_unsent(cache: KvCache, block: Block) -> None:
    """Workers must be told the block's new page before they use it again."""
    for table in cache.tables.values():
        if table.group == block.group and block in table.blocks:
            table.num_sent = min(table.num_sent, table.blocks.index(block))
