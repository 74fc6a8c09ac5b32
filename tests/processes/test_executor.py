"""Real workers on a tiny model, driven by messages written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from nitsum.messages import Fault, Ready
from nitsum.plan import Group
from nitsum.request import SamplingParams
from tests.processes.driver import (
    ALONE_0,
    ALONE_1,
    BOTH,
    Driver,
    largest_difference,
    logits_of,
    make_config,
    tokens_of,
)

pytestmark = pytest.mark.processes

GREEDY = SamplingParams(temperature=0.0, return_logits=True)
NUM_TOKENS = 9
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ready() -> list[Ready]:
    return []


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, ready: list[Ready]) -> Iterator[Driver]:
    driver = Driver(make_config(tmp_path_factory.mktemp("tiny")))
    ready.extend(driver.executor.start())
    yield driver
    driver.executor.close()


@pytest.fixture(scope="module")
def reference(driver: Driver) -> list[object]:
    return list(driver.generate(ALONE_0, NUM_TOKENS, GREEDY))


def test_ready_says_what_it_took(driver: Driver, ready: list[Ready]):
    assert [report.rank for report in ready] == [0, 1]
    assert all(set(report.phases) == {"load", "map", "warm_up"} for report in ready)
    unit_bytes = (
        2 * 2 * 2 * 4 * 8 * 4
    )  # K and V, layers, heads of a unit, tokens, head_dim, float32
    assert ready[0].num_units == (1 << 20) // unit_bytes
    assert ready[0].memory_bytes["kv"] == 1 << 20


@pytest.mark.parametrize("group", [ALONE_1, BOTH], ids=str)
def test_every_lane_computes_the_same(driver: Driver, reference: list, group: Group):
    done = driver.generate(group, NUM_TOKENS, GREEDY)
    assert tokens_of(done) == tokens_of(reference)
    assert len(logits_of(done)) == NUM_TOKENS
    assert largest_difference(done, reference) < TOLERANCE
    assert all(reply.rank == group.leader and reply.seconds > 0 for reply in done)


@pytest.mark.parametrize(
    ("src", "dst"), list(itertools.permutations([ALONE_0, ALONE_1, BOTH], 2)), ids=str
)
@pytest.mark.parametrize("num_before", [1, 2, 6])
def test_a_sequence_that_changes_lanes_goes_on_as_if_it_had_not(
    driver: Driver, reference: list, src: Group, dst: Group, num_before: int
):
    done = driver.generate_across(src, dst, num_before, NUM_TOKENS, GREEDY)
    assert tokens_of(done) == tokens_of(reference)
    assert largest_difference(done, reference) < TOLERANCE


def test_seeds_and_penalties_survive_the_move(driver: Driver):
    """Random streams and counts are functions of the row, which came along."""
    sampling = SamplingParams(
        temperature=1.5, seed=9, frequency_penalty=0.8, repetition_penalty=1.2, logprobs=2
    )
    still = driver.generate(ALONE_0, NUM_TOKENS, sampling)
    moved = driver.generate_across(BOTH, ALONE_1, 4, NUM_TOKENS, sampling)
    assert tokens_of(moved) == tokens_of(still)
    assert len(set(tokens_of(still))) > 4
    assert all(reply.logprobs[0] and len(reply.logprobs[0].top_ids) == 2 for reply in still)


@pytest.mark.parametrize(
    ("fault", "src", "dst"),
    [
        ("swap-heads", ALONE_0, BOTH),
        ("stale-block", ALONE_0, ALONE_1),
        ("lost-tail", BOTH, ALONE_1),
        ("wrong-vocab", ALONE_0, BOTH),
    ],
)
def test_planted_faults_are_seen(
    tmp_path: Path, reference: list, fault: Fault, src: Group, dst: Group
):
    """Whoever compares logits as above would notice each of them."""
    driver = Driver(make_config(tmp_path, fault=fault))
    driver.executor.start()
    try:
        done = driver.generate_across(src, dst, 4, NUM_TOKENS, GREEDY)
    finally:
        driver.executor.close()
    before, after = slice(0, 4), slice(4, None)
    assert largest_difference(done[before], reference[before]) < TOLERANCE
    assert largest_difference(done[after], reference[after]) > 10 * TOLERANCE
