"""Full collections happen only where nobody waits."""

import gc
from collections.abc import Iterator

import pytest

from nitsum.garbage import (
    IDLE_EVERY_S,
    IdleCollector,
    collect_as_usual,
    collect_unless_python_does,
    collect_when_told,
    collect_young_only,
)


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that were collected; the settings are put back."""
    before, found = gc.get_threshold(), list[int]()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*before)
    collect_as_usual()


def test_allocating_never_collects_what_is_old(collections: list[int]):
    collect_young_only()
    collections.clear()
    kept = [[i] for i in range(200_000)]
    assert len(kept) == 200_000
    assert 0 in collections
    assert 2 not in collections


def test_an_engine_collects_nothing_on_its_own(collections: list[int]):
    collect_when_told()
    collections.clear()
    kept = [[i] for i in range(200_000)]
    assert len(kept) == 200_000
    assert not collections


def test_idle_times_collect_everything_now_and_then(collections: list[int]):
    collector = IdleCollector(now=100.0)
    collector.collect(100.0 + 0.5 * IDLE_EVERY_S)
    assert 2 not in collections
    collector.collect(100.0 + IDLE_EVERY_S)
    collector.collect(101.0 + IDLE_EVERY_S)
    assert collections.count(2) == 1


def test_what_a_generation_leaves_is_collected_where_nothing_else_would(collections: list[int]):
    """Only there: a full collection takes as long as the process is large."""
    collect_unless_python_does()
    assert 2 not in collections
    collect_when_told()
    collections.clear()
    collect_unless_python_does()
    assert collections.count(2) == 1
    assert gc.get_freeze_count() > 0
    assert not gc.isenabled()
