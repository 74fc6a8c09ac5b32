"""Collectives between real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nitsum.plan import Group, all_groups
from tests.processes import ranks
from tests.processes.pool import Pool

pytestmark = pytest.mark.processes

LANES = [group for group in all_groups(4) if group.degree > 1]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("group", LANES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8, 33, 301])
def test_every_rank_has_the_same_bits_of_the_sum_in_shard_order(
    pool: Pool, group: Group, num_tokens: int
):
    """301 x 575 takes the form for large tensors at degree 4, and does not divide by 4."""
    size, num_calls = (num_tokens, 575), 3
    results = pool.run(
        ranks.all_reduce, {rank: (group, rank, size, num_calls) for rank in group.ranks}
    )
    for call in range(num_calls):
        expected = torch.zeros(size)
        for shard in range(group.degree):
            expected += ranks.partial(group.rank_of_shard(shard), size, call)
        for rank in group.ranks:
            torch.testing.assert_close(results[rank][call], expected, rtol=0, atol=0)


@pytest.mark.parametrize("group", LANES, ids=str)
def test_a_step_s_collectives_one_after_the_other(pool: Pool, group: Group):
    """Hundreds of them, unsynchronised otherwise: nobody reads what is of another call."""
    num_steps = 200
    results = pool.run(ranks.mixed_calls, {rank: (group, rank, num_steps) for rank in group.ranks})
    for rank in group.ranks:
        for step, seen in enumerate(results[rank]):
            total = float(sum(step + member for member in group.ranks))
            vocabulary = [float(step + token) for token in range(204)]
            assert seen == [total, total, *vocabulary, step, step + 1, step + 2]


def test_a_rank_knows_how_long_it_waited(pool: Pool):
    group = Group(2, 0)
    waited = pool.run(ranks.wait_for_a_late_one, {rank: (group, rank, 0.5) for rank in group.ranks})
    assert waited[0][0] < 0.25 < waited[1][0] < 5.0
    assert [since for _, since in waited.values()] == [0.0, 0.0]


def test_a_late_rank_is_named(pool: Pool):
    """Rank 1 arrives and waits too; ranks 2 and 3 never come. The last test of this pool: a group
    that missed somebody is of no use afterwards, as in a real generation."""
    group = Group(4, 0)
    messages = pool.run(ranks.wait_alone, {0: (group, 0), 1: (group, 1)})
    assert messages[0] == "waited 0.2 s in TP4@0-3 for rank(s) 2, 3."
    assert messages[1] == "waited 0.2 s in TP4@0-3 for rank(s) 2, 3."
