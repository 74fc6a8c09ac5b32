"""The prefix cache: which block, in which lane's layout, holds the KV of which tokens.

A block's hash covers its tokens and everything before them, so equal hashes mean equal KV. There
is at most one copy for each hash and group.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain, islice

from nitsum.kv.blocks import Block
from nitsum.kv.branches import Branch, Branches
from nitsum.plan import Group


def hash_block(previous: int, tokens: Sequence[int]) -> int:
    """128-bit hash of a full block that follows the block (or salt) hashed to `previous`."""
    data = previous.to_bytes(16, "little", signed=False) + array("q", tokens).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "little")


def hash_prompt(tokens: Sequence[int], block_tokens: int, salt: int = 0) -> list[int]:
    """Hashes of all full blocks of `tokens`."""
    hashes: list[int] = []
    previous = salt
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        previous = hash_block(previous, tokens[start : start + block_tokens])
        hashes.append(previous)
    return hashes


KEPT = -1
"""Level of blocks that somebody will come back for: evicted after all others."""


class PrefixIndex:
    """Cached blocks by hash, and the unreferenced ones in the order in which they may go."""

    def __init__(self) -> None:
        self._by_hash: dict[Group, dict[int, Block]] = {}
        self._branches = Branches()
        # idle[group][level]: unreferenced blocks, least recently used first.
        self._idle: dict[Group, dict[int, OrderedDict[Block, int]]] = {}
        self.num_idle: dict[Group, int] = {}
        """Unreferenced blocks by layout."""
        self._kept: dict[int, int] = {}
        """How many want a hash kept."""
        self._clock = 0

    def get(self, group: Group, block_hash: int) -> Block | None:
        blocks = self._by_hash.get(group)
        return blocks.get(block_hash) if blocks else None

    def in_layout(self, group: Group) -> dict[int, Block]:
        """The cached blocks of one layout by hash; not to be changed."""
        return self._by_hash.get(group, {})

    def match(self, group: Group, hashes: Sequence[int]) -> int:
        """How many leading blocks are cached in this group's layout."""
        blocks = self._by_hash.get(group)
        if not blocks:
            return 0
        for index, block_hash in enumerate(hashes):
            if block_hash not in blocks:
                return index
        return len(hashes)

    def groups(self) -> list[Group]:
        return [group for group, blocks in self._by_hash.items() if blocks]

    def add(self, block: Block, hashes: Sequence[int], place: int) -> bool:
        """Index a full block, the one at `place` of a prefix whose blocks hash to `hashes`; False
        when another copy in this layout was first."""
        blocks, block_hash = self._by_hash.setdefault(block.group, {}), hashes[place]
        if block_hash in blocks:
            return False
        before = blocks.get(hashes[place - 1]) if place else None
        branch = None if before is None else before.branch
        if before is None or self._has_another_follower(before, block_hash):
            branch = self._branches.begin(block_hash, branch, place)
        else:
            before.follower = block_hash
        self._index(blocks, block, block_hash, branch, place)
        return True

    def add_copy(self, block: Block, source: Block) -> bool:
        """Index a copy of a cached block in another layout; False as above."""
        blocks, block_hash = self._by_hash.setdefault(block.group, {}), source.hash
        assert block_hash is not None
        if block_hash in blocks:
            return False
        block.follower = source.follower
        self._index(blocks, block, block_hash, source.branch, source.place)
        return True

    def _has_another_follower(self, before: Block, block_hash: int) -> bool:
        """Whether a block that comes after `before` begins a branch: another one goes on with the
        branch of `before`, or it heads one already."""
        follower = before.follower
        if follower is None or follower == block_hash:
            return False
        is_cached = any(follower in blocks for blocks in self._by_hash.values())
        return is_cached or block_hash in self._branches

    def _index(
        self,
        blocks: dict[int, Block],
        block: Block,
        block_hash: int,
        branch: Branch | None,
        place: int,
    ) -> None:
        assert branch is not None, "a block that others follow is in no branch"
        block.hash, block.branch, block.place = block_hash, branch, place
        blocks[block_hash] = block
        self._branches.count(branch, 1)

    def forget(self, block: Block) -> None:
        """Drop a block from the index; it must be unreferenced or about to be freed."""
        if block.hash is not None:
            self.use(block)
            self.unlist(block)

    def unlist(self, block: Block) -> None:
        """Drop a block that has just lost its last reference: it is indexed, but not idle."""
        assert block.hash is not None
        assert block.branch is not None
        del self._by_hash[block.group][block.hash]
        self._branches.count(block.branch, -1)
        block.hash = block.branch = None

    def park(self, blocks: Sequence[Block]) -> None:
        """The last references of blocks of one layout went away: keep them as the most recently
        used of their levels, the last one more than the first."""
        if not blocks:
            return
        group = blocks[0].group
        levels = self._idle.setdefault(group, {})
        for block in blocks:
            level = self._level(block)
            queue = levels.get(level)
            if queue is None:
                queue = levels[level] = OrderedDict()
            self._clock += 1
            queue[block] = self._clock
        self.num_idle[group] = self.num_idle.get(group, 0) + len(blocks)

    def use(self, block: Block) -> None:
        """A reference came (back): it is no candidate for eviction."""
        blocks = self._idle.get(block.group, {}).get(self._level(block))
        if blocks and blocks.pop(block, None) is not None:
            self.num_idle[block.group] -= 1

    def keep(self, hashes: Iterable[int]) -> None:
        """Evict these blocks last, in every layout, until `unkeep` is called as often."""
        for block_hash in hashes:
            count = self._kept.get(block_hash, 0)
            self._mark(block_hash, count + 1)

    def unkeep(self, hashes: Iterable[int]) -> None:
        for block_hash in hashes:
            self._mark(block_hash, self._kept[block_hash] - 1)

    def eviction_order(self, block: Block) -> tuple[int, int]:
        """Sort key of an unreferenced block: lowest tier first, then longest unused."""
        level = self._level(block)
        return (-level, self._idle[block.group][level][block])

    def victim(self, rank: int, max_degree: int | None = None) -> Block | None:
        """The next block to evict for room on `rank`, of lanes up to `max_degree` if given."""
        best: Block | None = None
        best_key = (1, 0)
        for group, levels in self._idle.items():
            if rank not in group.ranks or (max_degree and group.degree > max_degree):
                continue
            for level, blocks in levels.items():
                if blocks:
                    block, used = next(iter(blocks.items()))
                    if best is None or (-level, used) < best_key:
                        best, best_key = block, (-level, used)
        return best

    def in_eviction_order(self, groups: Collection[Group]) -> Iterator[Block]:
        """Unreferenced blocks of these layouts, the next to go first. Not to be used after any of
        them was evicted or used."""
        levels: dict[int, list[OrderedDict[Block, int]]] = {}
        for group, idle in self._idle.items():
            if group in groups:
                for level, blocks in idle.items():
                    levels.setdefault(level, []).append(blocks)
        for level in sorted(levels, reverse=True):
            queues = [queue for queue in levels[level] if queue]
            if len(queues) == 1:
                yield from queues[0]
            else:
                aged = merge(*[queue.items() for queue in queues], key=lambda entry: entry[1])
                yield from (block for block, _ in aged)

    def is_kept(self, block: Block) -> bool:
        """Somebody will come back for it."""
        return block.hash in self._kept

    def idle(self, group: Group) -> list[Block]:
        """Unreferenced blocks of a group, most recently used last."""
        levels = self._idle.get(group, {})
        aged = [
            (used, i, b) for level in levels.values() for i, (b, used) in enumerate(level.items())
        ]
        return [block for _, _, block in sorted(aged, key=lambda entry: entry[0])]

    def newest(self, group: Group, count: int) -> list[Block]:
        """Up to `count` unreferenced blocks of a group, those that would be evicted last first."""
        levels = self._idle.get(group, {})
        valued = chain.from_iterable(reversed(levels[level]) for level in sorted(levels))
        return list(islice(valued, count))

    def _level(self, block: Block) -> int:
        return KEPT if block.hash in self._kept else block.level

    def _mark(self, block_hash: int, count: int) -> None:
        """Unreferenced copies change their place among those that may be evicted."""
        changes = (block_hash in self._kept) != (count > 0)
        found = [blocks[block_hash] for blocks in self._by_hash.values() if block_hash in blocks]
        idle = [block for block in found if block.refs == 0] if changes else []
        for block in idle:
            self.use(block)
        if count:
            self._kept[block_hash] = count
        else:
            self._kept.pop(block_hash, None)
        for block in idle:
            self.park([block])

    def all_blocks(self) -> Iterator[Block]:
        for blocks in self._by_hash.values():
            yield from blocks.values()
