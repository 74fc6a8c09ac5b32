"""Room for large pages in an arena full of small ones."""

from typing import Any

import pytest

from nitsum.kv import evict
from nitsum.kv.blocks import Block
from nitsum.kv.cache import ArenaShape, KvCache
from nitsum.kv.check import check
from nitsum.plan import Group

NARROW, WIDE = Group(1, 0), Group(2, 0)


def cache_of(num_blocks: int) -> KvCache:
    return KvCache(ArenaShape(2, 2 * num_blocks, 2, 1))


def fill(cache: KvCache, name: str, num_blocks: int, *, cached: bool) -> None:
    """A wide table of `num_blocks`; closed at once and kept as a cached prefix if `cached`."""
    hashes = [hash((name, i)) for i in range(num_blocks)]
    cache.open(name, WIDE, [])
    assert cache.grow(name, num_blocks)
    if cached:
        cache.register(name, hashes, len(hashes))
        cache.close(name)


def test_cached_blocks_make_way_when_there_is_nowhere_to_move_them():
    """The arena holds nothing but small cached pages: none is in use, so all of it can be had."""
    cache = cache_of(64)
    fill(cache, "cached", 128, cached=True)
    assert cache.pools[0].num_free == 0
    cache.open("new", NARROW, [])
    assert cache.grow("new", 64)
    check(cache)


def test_pages_in_use_are_moved_not_lost():
    """Every second page is let go: half of the units are free, and no two neighbours."""
    cache = cache_of(32)
    for i in range(64):
        fill(cache, f"wide{i}", 1, cached=False)
    for i in range(0, 64, 2):
        cache.close(f"wide{i}")
    cache.open("new", NARROW, [])
    assert cache.grow("new", 16)
    assert not cache.grow("new", 17)
    assert len(cache.take_copies()) >= 16
    check(cache)


def test_the_longest_unused_goes_first():
    cache = cache_of(8)
    fill(cache, "old", 8, cached=True)
    fill(cache, "young", 8, cached=True)
    cache.open("new", NARROW, [])
    assert cache.grow("new", 2)
    assert cache.prefixes.match(WIDE, [hash(("young", i)) for i in range(8)]) == 8


def test_pinned_pages_stay():
    cache = cache_of(8)
    fill(cache, "used", 16, cached=False)
    for block in cache.tables["used"].blocks:
        block.pins += 1
    cache.open("new", NARROW, [])
    assert not cache.grow("new", 1)
    assert not cache.take_copies()


def test_a_large_arena_is_emptied_with_few_looks(monkeypatch: pytest.MonkeyPatch):
    """Work, not time: places looked at grow no faster than the pages room is made for."""
    num_looks, num_blocks = 0, 2000
    look = evict.whole_blocks

    def counting(*place: Any) -> list[Block] | None:
        nonlocal num_looks
        num_looks += 1
        return look(*place)

    monkeypatch.setattr(evict, "whole_blocks", counting)
    cache = cache_of(num_blocks)
    fill(cache, "cached", 2 * num_blocks, cached=True)
    cache.open("new", NARROW, [])
    for size in range(100, num_blocks + 1, 100):
        assert cache.grow("new", size)
    assert num_blocks <= num_looks < 5 * num_blocks  # on both ranks
