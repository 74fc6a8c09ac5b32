"""KV accounting of the whole machine: who owns which units, on every rank, at every moment.

Nothing here touches memory. The engine sends workers what this decides: pages for tables, and the
relocations that make room where free units are scattered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nitsum.kv.blocks import Block, Holder, Relocation, Table
from nitsum.kv.compact import Compaction
from nitsum.kv.evict import FEW_REGIONS, Eviction
from nitsum.kv.host import HostMemory, Load, ParkedTable, Save
from nitsum.kv.prefix import PrefixIndex
from nitsum.kv.units import UnitPool
from nitsum.plan import Group
from nitsum.shape import units_per_page


@dataclass(frozen=True)
class ArenaShape:
    """What the accounting must know of the arenas."""

    num_ranks: int
    num_units: int
    """Units per rank."""
    units_per_block: int
    """U: units of one block over all its heads, replicas not counted."""
    block_tokens: int
    min_degree: int = 1
    """Narrowest lane of any plan; its pages are the largest blocks ever allocated."""
    unit_bytes: int = 1
    num_host_units: int = 0
    """Units of host memory per rank, for KV that has to leave the device."""

    def page_units(self, group: Group) -> int:
        return units_per_page(group.degree, self.units_per_block)

    def page_order(self, group: Group) -> int:
        return self.page_units(group).bit_length() - 1


class KvCache:
    """Tables of requests over buddy pools, one pool a rank, with prefix sharing."""

    def __init__(self, arena: ArenaShape, *, prefix_caching: bool = True) -> None:
        self.arena = arena
        self.prefix_caching = prefix_caching
        max_order = units_per_page(arena.min_degree, arena.units_per_block).bit_length() - 1
        self.pools = [UnitPool(arena.num_units, max_order) for _ in range(arena.num_ranks)]
        self.prefixes = PrefixIndex()
        self.tables: dict[str, Table] = {}
        self.host = HostMemory(arena.num_ranks, arena.num_host_units)
        self.parked: dict[str, ParkedTable] = {}
        """Tables of requests whose KV is in host memory."""
        self.holders: dict[Holder, None] = {}
        """What holds blocks besides tables: transfers under way."""
        self.owners: list[list[Block | None]] = [[None] * pool.num_units for pool in self.pools]
        """By rank and first unit of a page: the block that was placed there last. It may be gone,
        or moved, since: see `Eviction`."""
        self._eviction = Eviction(arena, self.pools, self.prefixes, self.owners)
        self._compaction = Compaction(self)
        self._copies: list[Relocation | Save | Load] = []
        self.num_relocations = 0

    # -- a request's table --

    def open(self, request_id: str, group: Group, hashes: Sequence[int], level: int = 0) -> int:
        """Start a table with the cached blocks of the longest matching prefix.

        Returns the number of tokens that need no computing.
        """
        assert request_id not in self.tables, request_id
        num_hits = self.prefixes.match(group, hashes) if self.prefix_caching else 0
        blocks = [self._hit(group, block_hash, level) for block_hash in hashes[:num_hits]]
        table = Table(group, blocks)
        table.num_registered = num_hits
        self.tables[request_id] = table
        return num_hits * self.arena.block_tokens

    def grow(self, request_id: str, num_tokens: int) -> bool:
        """Make the table cover `num_tokens` positions; False, and nothing changed, if no room."""
        table = self.tables[request_id]
        num_before = len(table.blocks)
        num_needed = -(-num_tokens // self.arena.block_tokens)
        count = num_needed - num_before
        if count <= 0:
            return True
        free = self._alloc_free(table.group, count)
        if free is None:
            if self.free_blocks(table.group) < count:
                return False
            for rank in table.group.ranks:
                self._eviction.make_room(rank, self.arena.page_order(table.group), count)
            free = self._alloc_free(table.group, count)
        if free is not None:
            table.blocks.extend(free)
            return True
        while len(table.blocks) < num_needed:
            block = self.alloc_block(table.group)
            if block is None:
                self.drop(table.blocks[num_before:])
                del table.blocks[num_before:]
                return False
            table.blocks.append(block)
        return True

    def register(
        self, request_id: str, hashes: Sequence[int], num_blocks: int, level: int = 0
    ) -> None:
        """Tell the prefix index about the table's first `num_blocks` blocks, which hash to
        `hashes`; that may be more."""
        table = self.tables[request_id]
        if not self.prefix_caching:
            return
        for index in range(table.num_registered, min(num_blocks, len(table.blocks))):
            block = table.blocks[index]
            block.level = level
            self.prefixes.add(block, hashes, index)
            table.num_registered = index + 1

    def close(self, request_id: str) -> None:
        """The request is gone: its blocks lose a reference, hashed ones stay cached."""
        table = self.tables.pop(request_id)
        self.drop(reversed(table.blocks))  # the end of a prefix is evicted before its start

    def replace_table(self, request_id: str, table: Table) -> None:
        """The request continues on other blocks, whose references are handed in with the table;
        those of the old one now belong to the caller."""
        self.tables[request_id] = table

    # -- host memory --

    def offload(self, request_id: str) -> bool:
        """Park a request's KV in host memory and close its table; False if there is no room.

        The copies follow the steps sent so far, so what those write comes along.
        """
        table = self.tables[request_id]
        made = self.host.park(table.group, table.blocks, self.arena.page_units(table.group))
        if made is None:
            return False
        self.parked[request_id], saves = made
        self._copies.extend(saves)
        self.close(request_id)
        return True

    def restore(self, request_id: str, group: Group, level: int = 0) -> bool:
        """Bring parked KV back, in the layout of `group`; False, and nothing changed, if no room.

        Leading blocks that are cached in this layout are used as they are.
        """
        parked, size = self.parked[request_id], self.arena.block_tokens
        first = self.open(request_id, group, parked.hashes, level) // size
        if not self.grow(request_id, parked.num_blocks * size):
            self.close(request_id)
            return False
        blocks = self.tables[request_id].blocks[first:]
        self._copies.extend(
            self.host.load(parked, group, blocks, first, self.arena.units_per_block)
        )
        self.register(request_id, parked.hashes, len(parked.hashes), level)
        self.discard(request_id)
        return True

    def discard(self, request_id: str) -> None:
        """Forget parked KV."""
        self.host.discard(self.parked.pop(request_id))

    # -- pages --

    def slot_pages(self, table: Table, first: int) -> list[list[int]]:
        """Page ids of blocks `first..`, for each rank of the table's group."""
        known, table.pages = table.pages, None
        if known is not None and known.num_relocations == self.num_relocations and not first:
            rest = table.blocks[len(known.columns[0]) :]
            for place, column in enumerate(known.columns):
                column.extend([block.pages[place] for block in rest])
            return known.columns
        blocks = table.blocks[first:]
        return [[block.pages[i] for block in blocks] for i in range(table.group.degree)]

    # -- blocks --

    def alloc_block(self, group: Group) -> Block | None:
        """A fresh block with one reference, evicting and compacting as needed; None when full."""
        order = self.arena.page_order(group)
        pages: list[int] = []
        for rank in group.ranks:
            start = self.alloc_units(rank, order)
            if start is None:
                self._eviction.release(group, pages)
                return None
            pages.append(start >> order)
        block = Block(group, pages)
        self.place([block])
        return block

    def alloc_pages(self, rank: int, order: int, count: int, *, compacts: bool) -> list[int]:
        """Starts of `count` pages of `2**order` units: free, else evicted, else, if `compacts`,
        made by moving, which takes long. Fewer, if there is no room for as many, or if the search
        for it goes on with the next call: see `is_searching`."""
        pool = self.pools[rank]
        if pool.num_pages(order) < count:
            self._eviction.make_room(rank, order, count, FEW_REGIONS)
        starts = pool.alloc_many(order, min(count, pool.num_pages(order))) or []
        while compacts and len(starts) < count and not self._eviction.goes_on(rank, order):
            start = self.alloc_units(rank, order)
            if start is None:
                break
            starts.append(start)
        return starts

    def is_searching(self, rank: int, order: int) -> bool:
        """Whether the last search for such pages was cut short: there may be more."""
        return self._eviction.goes_on(rank, order)

    def place(self, blocks: Sequence[Block]) -> None:
        """Remember where new blocks of one layout lie."""
        if not blocks:
            return
        group = blocks[0].group
        order = self.arena.page_order(group)
        for place, rank in enumerate(group.ranks):
            owners = self.owners[rank]
            for block in blocks:
                owners[block.pages[place] << order] = block

    def _alloc_free(self, group: Group, count: int) -> list[Block] | None:
        """Fresh blocks out of units that are free as it is; None, and no change, if too few."""
        order = self.arena.page_order(group)
        columns: list[list[int]] = []
        for rank in group.ranks:
            starts = self.pools[rank].alloc_many(order, count)
            if starts is None:
                for done, column in zip(group.ranks, columns, strict=False):
                    for page in reversed(column):
                        self.pools[done].release(page << order, 1 << order)
                return None
            columns.append([start >> order for start in starts])
        blocks = [Block(group, list(pages)) for pages in zip(*columns, strict=True)]
        self.place(blocks)
        return blocks

    def has_free(self, group: Group, num_tokens: int) -> bool:
        """Whether so many positions fit into units that are free as it is."""
        count, order = -(-num_tokens // self.arena.block_tokens), self.arena.page_order(group)
        return all(self.pools[rank].num_pages(order) >= count for rank in group.ranks)

    def alloc_units(self, rank: int, order: int) -> int | None:
        """The start of `2**order` units on one rank: free, else evicted, else made by moving."""
        pool = self.pools[rank]
        start = pool.alloc(order)
        if start is None:
            self._eviction.make_room(rank, order, 1)
            start = pool.alloc(order)
        if start is None:
            start = self._compact(rank, order)
        # A large page far down the order may be the last help.
        while start is None:
            victim = self.prefixes.victim(rank, self.arena.units_per_block >> order)
            if victim is None:
                return None
            self.evict(victim)
            start = pool.alloc(order)
        return start

    def retain(self, block: Block, level: int | None = None) -> None:
        """One more user of a block, cached or in use."""
        if block.refs == 0:
            self.prefixes.use(block)
            block.level = block.level if level is None else level
        elif level is not None:
            block.level = min(block.level, level)
        block.refs += 1

    def drop(self, blocks: Iterable[Block]) -> None:
        """One user less for each block of one layout; without users it stays cached if hashed, else
        is freed."""
        idle: list[Block] = []
        for block in blocks:
            assert block.refs > 0, "block dropped twice"
            block.refs -= 1
            if block.refs:
                continue
            if block.hash is not None:
                idle.append(block)
            else:
                self._eviction.release(block.group, block.pages)
        self.prefixes.park(idle)

    def let_go(self, blocks: Iterable[Block], num_refs: int, *, keep: bool) -> None:
        """Nobody reads these blocks of one layout any more: unpin them, and drop `num_refs`
        references each.

        Blocks without users stay cached if `keep` says so and they are hashed, else are freed.
        """
        self._eviction.look_anew()
        idle: list[Block] = []
        for block in blocks:
            block.pins -= 1
            block.refs -= num_refs
            if block.refs:
                continue
            if block.hash is not None:
                if keep:
                    idle.append(block)
                    continue
                self.prefixes.unlist(block)
            self._eviction.release(block.group, block.pages)
        self.prefixes.park(idle)

    def evict(self, block: Block) -> None:
        """Free a cached, unreferenced block."""
        self._eviction.evict(block)

    def evict_group(self, group: Group, count: int) -> bool:
        """Drop up to `count` unreferenced blocks of a layout that no lane uses any more; whether
        that were all."""
        return self._eviction.evict_group(group, count)

    def free_around(self, rank: int, first: int, last: int) -> bool:
        """Make units `first..last` free by evicting what is idle there; False, and nothing changed,
        if any is in use or kept for somebody."""
        return self._eviction.free_around(rank, first, last)

    # -- what the engine must send --

    def take_copies(self) -> list[Relocation | Save | Load]:
        """Copies decided since the last call, in order."""
        copies, self._copies = self._copies, []
        return copies

    def take_evictions(self) -> dict[Group, int]:
        """Cached blocks dropped for room since the last call, by layout."""
        return self._eviction.take_counts()

    # -- figures --

    def free_units(self, rank: int) -> int:
        """Units on `rank` that a new block could have: free ones and unreferenced cached ones."""
        idle = sum(
            count * self.arena.page_units(group)
            for group, count in self.prefixes.num_idle.items()
            if rank in group.ranks
        )
        return self.pools[rank].num_free + idle

    def used_share(self, rank: int) -> float:
        """Share of the rank's units in use by requests; cached blocks without user not counted."""
        return 1.0 - self.free_units(rank) / self.pools[rank].num_units

    def free_blocks(self, group: Group) -> int:
        """Blocks a lane could still have: the minimum over its ranks."""
        page_units = self.arena.page_units(group)
        return min(self.free_units(rank) for rank in group.ranks) // page_units

    def blocks(self) -> set[Block]:
        """Every block there is."""
        found = set(self.prefixes.all_blocks())
        for holder in self.holders:
            found.update(held.block for held in holder.held())
        for table in self.tables.values():
            found.update(table.blocks)
        return found

    # -- inside --

    def _hit(self, group: Group, block_hash: int, level: int) -> Block:
        block = self.prefixes.get(group, block_hash)
        assert block is not None
        self.retain(block, level)
        return block

    def _compact(self, rank: int, order: int) -> int | None:
        if order == 0 or self.free_units(rank) < 1 << order:
            return None
        made = self._compaction.make_room(rank, order)
        if made is None:
            return None
        start, relocations = made
        self._copies.extend(relocations)
        self.num_relocations += len(relocations)
        return start
