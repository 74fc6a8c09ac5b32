"""What of the cache makes way for new pages: blocks without users, the least valuable first.

Layouts differ in the size of their pages, so evicting a block may free a page too small to be of
use: what lies around it must be free or idle as well, and goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from nitsum.kv.blocks import Block
from nitsum.kv.prefix import PrefixIndex
from nitsum.kv.units import UnitPool
from nitsum.plan import Group

if TYPE_CHECKING:
    from nitsum.kv.cache import ArenaShape

MOST_LOOKED_AT = 8192
"""Cached blocks that one search for room looks at. The next one goes on where it ended."""
FEW_LOOKED_AT = 1024
"""The same for whoever can go on in a later turn."""


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
        to date by the cache. It may be gone, or moved, since: see `_idle_in`."""
        self.arena = arena
        self.pools = pools
        self.prefixes = prefixes
        self.owners = owners
        self._evicted: dict[Group, int] = {}
        self._num_useless: dict[tuple[int, int], int] = {}
        """By rank and order: blocks at the head of the eviction order around which no page of that
        size comes free, by the last search."""
        self._goes_on: dict[tuple[int, int], bool] = {}
        """By rank and order: whether the last search was cut short."""

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

    def make_room(self, rank: int, order: int, count: int, most: int = MOST_LOOKED_AT) -> None:
        """Evict until `count` pages of `2**order` units are free, the least valuable first.

        A block whose page is smaller goes only if the page around it comes free, together with
        what else lies idle there. Looks at `most` blocks; see `goes_on`.
        """
        page_units = {group: self.arena.page_units(group) for group in self.prefixes.num_idle}
        lacking = count - self.pools[rank].num_pages(order)
        num_useless = self._num_useless.get((rank, order), 0)
        blocks = islice(self.prefixes.in_eviction_order(rank), num_useless, None)
        chosen: dict[Block, None] = {}
        refs, owners = self.pools[rank].refs, self.owners[rank]
        num_looked_at = 0
        for block in islice(blocks, most):
            if lacking <= 0:
                break
            num_looked_at += 1
            if block in chosen:
                continue
            start = block.pages[rank - block.group.leader] * page_units[block.group]
            if _is_hopeless(refs, owners, start >> order << order, 1 << order):
                num_useless += 1
                continue
            around = self._idle_around(rank, block, order)
            if around is None:
                num_useless += 1
            else:
                chosen.update(dict.fromkeys(around))
                lacking -= max(1, 1 << self.arena.page_order(block.group) >> order)
        has_seen_all = lacking > 0 and num_looked_at < most
        self._num_useless[rank, order] = 0 if has_seen_all else num_useless
        self._goes_on[rank, order] = lacking > 0 and not has_seen_all
        for block in chosen:
            self.evict(block)

    def goes_on(self, rank: int, order: int) -> bool:
        """The last search for such pages ended before it had found enough or seen everything."""
        return self._goes_on.get((rank, order), False)

    def look_anew(self) -> None:
        """Blocks passed over may be of use now: searches begin with the least valuable again."""
        self._num_useless.clear()

    def free_around(self, rank: int, first: int, last: int) -> bool:
        """Make units `first..last` free by evicting what is idle there; False, and nothing changed,
        if any is in use or kept for somebody."""
        blocks = self._idle_in(rank, first, last)
        if blocks is None or any(map(self.prefixes.is_kept, blocks)):
            return False
        for block in blocks:
            self.evict(block)
        return True

    def _idle_around(self, rank: int, block: Block, order: int) -> list[Block] | None:
        """What to evict, `block` included, so that a page of `2**order` units is free there."""
        block_order = self.arena.page_order(block.group)
        start = block.pages[rank - block.group.leader] << block_order
        if block_order >= order and self.pools[rank].refs[start] == 1:
            return [block]
        first = start >> order << order
        return self._idle_in(rank, first, first + (1 << max(order, block_order)))

    def _idle_in(self, rank: int, first: int, last: int) -> list[Block] | None:
        """The unreferenced blocks in a range of units; None if anything else is in it."""
        refs, owners = self.pools[rank].refs, self.owners[rank]
        found: list[Block] = []
        unit = first
        while unit < last:
            if not refs[unit]:
                unit += 1
                continue
            block = owners[unit]
            if block is None or block.refs or block.hash is None:
                return None
            width = self.arena.page_units(block.group)
            end = unit + width
            if block.pages[rank - block.group.leader] * width != unit or end > last:
                return None  # moved since, or larger than the range
            if max(refs[unit:end]) > 1:
                return None
            found.append(block)
            unit = end
        return found


def _is_hopeless(refs: list[int], owners: list[Block | None], first: int, count: int) -> bool:
    """Whether a look tells that one of these units is in use: far more often than not, this is all
    there is to know of a place in a busy arena."""
    for unit in range(first, first + count):
        if not refs[unit]:
            continue
        if refs[unit] > 1:
            return True
        owner = owners[unit]
        if owner is not None and owner.refs:
            return True
    return False
