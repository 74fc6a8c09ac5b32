"""Moves between real processes, and the order that `after` promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nitsum.messages import Move, Pull, RowPull
from nitsum.shared import Progress
from tests.processes import ranks
from tests.processes.pool import Pool

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def fresh(pool: Pool) -> None:
    pool.run(ranks.fill, {rank: (rank,) for rank in (0, 1)})


def test_a_rank_pulls_what_another_process_wrote(pool: Pool):
    arenas, rows = ranks.memory_of(pool.shared)
    sources = [arena.unit_rows().clone() for arena in arenas]
    source_row = rows[1][6, :9].tolist()
    move = Move(1, [Pull(1, [8, 3], [0, 1])], [RowPull(1, 6, 2, 9)])
    pool.run(ranks.move_and_advance, {0: (0, move)})
    after = arenas[0].unit_rows()
    torch.testing.assert_close(after[:, [0, 1]], sources[1][:, [8, 3]], rtol=0, atol=0)
    torch.testing.assert_close(after[:, 2:], sources[0][:, 2:], rtol=0, atol=0)
    assert rows[0][2, :9].tolist() == source_row


def test_two_ranks_trade_units_at_the_same_time(pool: Pool):
    arenas, _ = ranks.memory_of(pool.shared)
    sources = [arena.unit_rows().clone() for arena in arenas]
    moves = {rank: Move(2, [Pull(1 - rank, [4, 5], [12, 13])]) for rank in (0, 1)}
    pool.run(ranks.move_and_advance, {rank: (rank, move) for rank, move in moves.items()})
    for rank in (0, 1):
        got = arenas[rank].unit_rows()[:, [12, 13]]
        torch.testing.assert_close(got, sources[1 - rank][:, [4, 5]], rtol=0, atol=0)


def test_a_move_starts_after_the_messages_it_names(pool: Pool):
    """Rank 1 completes its next message 0.2 s from now; rank 0 must not pull before."""
    progress = Progress(pool.shared.progress)
    count = progress.completed(1) + 1
    rank_0 = progress.completed(0)
    move = Move(3, [Pull(1, [8], [0])], [], [(1, count)])
    times = pool.run(_either, {0: (move,), 1: (None,)})
    assert times[0] >= times[1]
    assert (progress.completed(0), progress.completed(1)) == (rank_0 + 1, count)


def _either(shared: ranks.Shared, move: Move | None) -> float:
    if move is not None:
        return ranks.move_when_told(shared, 0, move)
    return ranks.advance_later(shared, 1, 0.2)
