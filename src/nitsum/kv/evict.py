"""What of the cache makes way for new pages: blocks without users, the least valuable first.

Layouts differ in the size of their pages, so evicting a block may free a page too small to be of
use: what lies around it must be free or idle as well, and goes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nitsum.kv.blocks import Block
from nitsum.kv.pages import whole_blocks
from nitsum.kv.prefix import KEPT, PrefixIndex
from nitsum.kv.units import UnitPool
from nitsum.plan import Group

if TYPE_CHECKING:
    from nitsum.kv.cache import ArenaShape

MOST_REGIONS = 8192
"""Places for a page that one search looks at. The next one goes on where it ended."""
FEW_REGIONS = 1024
"""The same for whoever can go on in a later turn."""
LOOKS_PER_PAGE = 4
"""Places looked at for each page that is wanted where large pages would do as well."""
SAMPLED = 2
"""Candidates for each page that is wanted, of which the least valuable goes."""
MOST_KEPT = 64
"""Candidates that somebody comes back for which a search passes over, hoping for others."""


class _Candidate(NamedTuple):
    """Idle blocks that give room if all of them go."""

    price: tuple[int, int]
    """When the last of them would be evicted: see `PrefixIndex.eviction_order`."""
    blocks: list[Block]
    num_pages: int

    @property
    def is_kept(self) -> bool:
        """Somebody will come back for one of them."""
        return self.price[0] == -KEPT


class Eviction:
    """Frees units of the pools by dropping cached blocks, and counts what was dropped."""

    def __init__(
        self,
        arena: ArenaShape,
        pools: list[UnitPool],
        prefixes: PrefixIndex,
        owners: list[list[Block | None]],
    ) -> None:
        """`owners`: by rank and first unit of a page, the block that was placed there last, kept up
        to date by the cache. It may be gone, or moved, since: see `whole_blocks`."""
        self.arena = arena
        self.pools = pools
        self.prefixes = prefixes
        self.owners = owners
        self._evicted: dict[Group, int] = {}
        self._next_place: dict[tuple[int, int], int] = {}
        """By rank and order: where the next search for such pages begins."""
        self._looked_at: dict[tuple[int, int], int] = {}
        """By rank and order: places seen since there were enough such pages."""

    # -- blocks --

    def evict(self, block: Block) -> None:
        """Free a cached, unreferenced block."""
        assert block.refs == 0
        assert block.hash is not None
        self.prefixes.forget(block)
        self.release(block.group, block.pages)
        self._evicted[block.group] = self._evicted.get(block.group, 0) + 1

    def evict_group(self, group: Group, count: int) -> bool:
        """Drop up to `count` unreferenced blocks of a layout that no lane uses any more; whether
        that were all."""
        blocks = self.prefixes.newest(group, count)
        for block in blocks:
            self.evict(block)
        return len(blocks) < count

    def take_counts(self) -> dict[Group, int]:
        """Blocks evicted since the last call, by layout."""
        evicted, self._evicted = self._evicted, {}
        return evicted

    def release(self, group: Group, pages: Sequence[int]) -> None:
        """Free pages, one on each of the group's first ranks, that no block has any more."""
        count = self.arena.page_units(group)
        for rank, page in zip(group.ranks, pages, strict=False):
            self.pools[rank].release(page * count, count)

    # -- room --

    def make_room(self, rank: int, order: int, count: int, most: int = MOST_REGIONS) -> None:
        """Evict until `count` pages of `2**order` units are free, the least valuable first.

        Blocks with pages as large or larger go by the order of eviction. Smaller ones are of use
        only where all of a page comes free: of those, the least valuable of a sample goes, found by
        a look at up to `most` places.
        """
        lacking = count - self.pools[rank].num_pages(order)
        if lacking <= 0:
            self._looked_at.pop((rank, order), None)
            return
        found = list(self._large(rank, order, lacking))
        if sum(candidate.num_pages for candidate in found if not candidate.is_kept) >= lacking:
            most = min(most, LOOKS_PER_PAGE * lacking)
        found.extend(self._small(rank, order, lacking, most))
        found.sort(key=lambda candidate: candidate.price)
        for candidate in found:
            if lacking <= 0:
                break
            for block in candidate.blocks:
                self.evict(block)
            lacking -= candidate.num_pages
        if lacking <= 0:
            self._looked_at.pop((rank, order), None)

    def goes_on(self, rank: int, order: int) -> bool:
        """The last search for such pages has not found enough, and has not seen every place."""
        num_places = self.pools[rank].num_units >> order
        return 0 < self._looked_at.get((rank, order), 0) < num_places

    def look_anew(self) -> None:
        """Places passed over may be of use now."""
        self._looked_at.clear()

    def _idle_on(self, rank: int) -> list[Group]:
        """Layouts of idle blocks that have pages on the rank."""
        idle = self.prefixes.num_idle
        return [group for group, count in idle.items() if count and rank in group.ranks]

    def _large(self, rank: int, order: int, count: int) -> Iterator[_Candidate]:
        """Blocks with pages of at least `2**order` units, for up to `count` such pages."""
        refs = self.pools[rank].refs
        groups = [group for group in self._idle_on(rank) if self.arena.page_order(group) >= order]
        for block in self.prefixes.in_eviction_order(groups):
            if count <= 0:
                return
            block_order = self.arena.page_order(block.group)
            start = block.pages[rank - block.group.leader] << block_order
            if max(refs[start : start + (1 << block_order)]) == 1:
                num_pages = 1 << block_order >> order
                yield _Candidate(self.prefixes.eviction_order(block), [block], num_pages)
                count -= num_pages

    def _small(self, rank: int, order: int, count: int, most: int) -> Iterator[_Candidate]:
        """Places for a page where only smaller pages of idle blocks lie, or nothing."""
        if all(self.arena.page_order(group) >= order for group in self._idle_on(rank)):
            self._looked_at.pop((rank, order), None)  # nothing is left to look for
            return
        num_places = self.pools[rank].num_units >> order
        place = self._next_place.get((rank, order), 0)
        num_found = num_kept = num_looked_at = 0
        while num_looked_at < min(most, num_places):
            candidate = self._small_at(rank, order, place)
            num_looked_at += 1
            place = (place + 1) % num_places
            if candidate is not None:
                yield candidate
                num_kept += candidate.is_kept
                num_found += not candidate.is_kept
            if num_found >= SAMPLED * count:
                break
            is_long = num_looked_at >= FEW_REGIONS or num_kept >= MOST_KEPT
            if is_long and num_found + num_kept >= count:
                break
        self._next_place[rank, order] = place
        self._looked_at[rank, order] = self._looked_at.get((rank, order), 0) + num_looked_at

    def _small_at(self, rank: int, order: int, place: int) -> _Candidate | None:
        blocks = self._idle_in(rank, place << order, (place + 1) << order)
        if not blocks or self.arena.page_order(blocks[0].group) >= order:
            return None
        return _Candidate(max(map(self.prefixes.eviction_order, blocks)), blocks, 1)

    def free_around(self, rank: int, first: int, last: int) -> bool:
        """Make units `first..last` free by evicting what is idle there; False, and nothing changed,
        if any is in use or kept for somebody."""
        blocks = self._idle_in(rank, first, last)
        if blocks is None or any(map(self.prefixes.is_kept, blocks)):
            return False
        for block in blocks:
            self.evict(block)
        return True

    def _idle_in(self, rank: int, first: int, last: int) -> list[Block] | None:
        """The unreferenced blocks in a range of units; None if anything else is in it."""
        pool, owners = self.pools[rank], self.owners[rank]
        return whole_blocks(self.arena, pool, owners, rank, range(first, last), _is_idle)


def _is_idle(block: Block) -> bool:
    return not block.refs and block.hash is not None
