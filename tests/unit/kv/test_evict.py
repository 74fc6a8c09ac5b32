"""What of the cache makes way for large pages where small ones lie."""

from nitsum.kv.cache import ArenaShape, KvCache
from nitsum.kv.check import check
from nitsum.kv.evict import FEW_REGIONS
from nitsum.plan import Group

NARROW, WIDE = Group(1, 0), Group(2, 0)


def cache_of(num_blocks: int) -> KvCache:
    """Two ranks with room for as many narrow blocks, or twice as many wide ones."""
    return KvCache(ArenaShape(2, 2 * num_blocks, 2, 1))


def hashes_of(name: str, num_blocks: int) -> list[int]:
    return [hash((name, i)) for i in range(num_blocks)]


def leave_behind(cache: KvCache, name: str, num_blocks: int) -> list[int]:
    """Cached wide blocks without users; their hashes."""
    hashes = hashes_of(name, num_blocks)
    cache.open(name, WIDE, [])
    assert cache.grow(name, num_blocks)
    cache.register(name, hashes, len(hashes))
    cache.close(name)
    return hashes


def use(cache: KvCache, name: str, num_blocks: int) -> None:
    cache.open(name, WIDE, [])
    assert cache.grow(name, num_blocks)


def test_what_somebody_comes_back_for_goes_last():
    """However near to hand it lies: nothing else is worth less."""
    cache = cache_of(64)
    kept = leave_behind(cache, "kept", 64)
    cache.prefixes.keep(kept)
    leave_behind(cache, "other", 64)
    cache.open("new", NARROW, [])
    for num_blocks in range(1, 33):
        assert cache.grow("new", num_blocks)
    assert cache.prefixes.match(WIDE, kept) == 64
    assert cache.grow("new", 33)
    check(cache)


def test_large_pages_that_somebody_comes_back_for_outlast_small_ones():
    cache = cache_of(64)
    hashes = hashes_of("kept", 8)
    use(cache, "used", 80)
    cache.open("kept", NARROW, [])
    assert cache.grow("kept", 8)
    cache.register("kept", hashes, len(hashes))
    cache.close("kept")
    cache.prefixes.keep(hashes)
    leave_behind(cache, "other", 32)
    cache.open("new", NARROW, [])
    assert cache.grow("new", 4)
    assert cache.prefixes.match(NARROW, hashes) == 8


def test_a_search_ends_when_what_it_looked_for_is_in_use_again():
    """Else who waits for it would wait for ever."""
    cache = cache_of(3 * FEW_REGIONS)
    use(cache, "used", 6 * FEW_REGIONS - 2)
    hashes = leave_behind(cache, "cached", 2)
    assert not cache.alloc_pages(0, 1, 1, compacts=False)
    assert cache.is_searching(0, 1)
    assert cache.open("back", WIDE, hashes) == 2
    assert not cache.alloc_pages(0, 1, 1, compacts=False)
    assert not cache.is_searching(0, 1)


def test_a_search_goes_on_where_it_ended_until_it_finds():
    cache = cache_of(3 * FEW_REGIONS)
    use(cache, "used", 6 * FEW_REGIONS - 2)
    leave_behind(cache, "cached", 2)
    num_calls = 0
    while not (starts := cache.alloc_pages(0, 1, 1, compacts=False)):
        assert cache.is_searching(0, 1)
        num_calls += 1
    assert len(starts) == 1
    assert num_calls == 2
    assert not cache.is_searching(0, 1)
