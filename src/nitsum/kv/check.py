"""Every unit is free or owned by known requests: the check that says so, and what it found."""

from __future__ import annotations

from nitsum.kv.blocks import Block
from nitsum.kv.cache import KvCache


def check(cache: KvCache) -> None:
    """Raise AssertionError naming the first unit, block or count that does not add up."""
    blocks = cache.blocks()
    _check_references(cache, blocks)
    for rank in range(cache.arena.num_ranks):
        _check_units(cache, rank, blocks)
        _check_free_lists(cache, rank)
    _check_hashes(cache, blocks)
    _check_host(cache)


def _check_references(cache: KvCache, blocks: set[Block]) -> None:
    users = dict.fromkeys(blocks, 0)
    pins = dict.fromkeys(blocks, 0)
    for table in cache.tables.values():
        for block in table.blocks:
            assert block.group == table.group, "a table holds a block of another layout"
            users[block] += 1
    for holder in cache.holders:
        for held in holder.held():
            users[held.block] += held.refs
            pins[held.block] += held.pins
    for block in blocks:
        name = f"block {block.group} {block.pages}"
        assert block.refs == users[block], f"{name}: {block.refs} refs, {users[block]} users"
        assert block.pins == pins[block], f"{name}: {block.pins} pins, {pins[block]} readers"
        assert block.refs > 0 or block.hash is not None, "an unreferenced block without a hash"


def _check_units(cache: KvCache, rank: int, blocks: set[Block]) -> None:
    pool = cache.pools[rank]
    owners = [0] * pool.num_units
    for block in blocks:
        if rank in block.group.ranks:
            count = cache.arena.page_units(block.group)
            start = block.pages[rank - block.group.leader] * count
            for unit in range(start, start + count):
                owners[unit] += 1
    for unit, (expected, refs) in enumerate(zip(owners, pool.refs, strict=True)):
        assert refs == expected, f"rank {rank} unit {unit}: {refs} references, {expected} owners"


def _check_free_lists(cache: KvCache, rank: int) -> None:
    pool = cache.pools[rank]
    free = [
        unit
        for order, starts in enumerate(pool.free)
        for start in starts
        for unit in range(start, start + (1 << order))
    ]
    assert len(free) == len(set(free)) == pool.num_free, f"rank {rank}: free units do not add up"
    assert not any(pool.refs[unit] for unit in free), f"rank {rank}: a free unit is referenced"
    assert pool.num_free == pool.refs.count(0), f"rank {rank}: a lost unit"


def _check_hashes(cache: KvCache, blocks: set[Block]) -> None:
    idle = {block for group in cache.prefixes.groups() for block in cache.prefixes.idle(group)}
    assert idle == {block for block in blocks if block.refs == 0}, "idle blocks do not add up"
    for rank in range(cache.arena.num_ranks):
        units = sum(
            cache.arena.page_units(block.group) for block in idle if rank in block.group.ranks
        )
        expected = cache.pools[rank].num_free + units
        assert cache.free_units(rank) == expected, f"rank {rank}: idle units do not add up"


def _check_host(cache: KvCache) -> None:
    both = cache.tables.keys() & cache.parked.keys()
    assert not both, f"KV on the device and parked at once: {sorted(both)}"
    for rank, pool in enumerate(cache.host.pools):
        owners = [0] * len(pool.refs)
        for parked in cache.parked.values():
            for unit in parked.units.get(rank, ()):
                owners[unit] += 1
        for held in cache.host.loading.values():
            for source, unit in held:
                owners[unit] += source == rank
        assert pool.refs == owners, f"rank {rank}: host units do not add up"
        assert pool.num_free == owners.count(0), f"rank {rank}: a lost host unit"
