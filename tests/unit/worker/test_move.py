"""The mover inside one process: what it copies, in which order, and what its faults break."""

from __future__ import annotations

import pytest
import torch

from nitsum.errors import WorkerDied
from nitsum.kv.moves import moves, page_units
from nitsum.messages import Fault, Move, Pull, RowPull
from nitsum.plan import Group, all_groups
from nitsum.shape import Geometry
from nitsum.shared import Progress, Shared, allocate
from nitsum.worker.move import Mover
from tests.processes.pool import SHAPE, make_spec
from tests.processes.ranks import fill, memory_of

NUM_RANKS = 4
SPEC = make_spec(NUM_RANKS)
NUM_UNITS = Geometry(SHAPE, 4).num_units


@pytest.fixture
def shared() -> Shared:
    shared = allocate(SPEC, Geometry(SHAPE, SPEC.max_tp))
    for rank in range(NUM_RANKS):
        fill(shared, rank)
    return shared


def mover(shared: Shared, rank: int, fault: Fault | None = None, timeout_s: float = 5.0) -> Mover:
    arenas, rows = memory_of(shared)
    return Mover(rank, arenas, rows, Progress(shared.progress), timeout_s, fault)


def units(shared: Shared, rank: int) -> torch.Tensor:
    return memory_of(shared)[0][rank].unit_rows()


def test_pulls_take_all_layers_keys_and_values(shared: Shared):
    before = [units(shared, rank).clone() for rank in range(NUM_RANKS)]
    done = mover(shared, 0).move(Move(7, [Pull(1, [3, 9], [4, 5]), Pull(2, [0], [20])]))
    after = units(shared, 0)
    torch.testing.assert_close(after[:, [4, 5]], before[1][:, [3, 9]], rtol=0, atol=0)
    torch.testing.assert_close(after[:, 20], before[2][:, 0], rtol=0, atol=0)
    others = [unit for unit in range(32) if unit not in (4, 5, 20)]
    torch.testing.assert_close(after[:, others], before[0][:, others], rtol=0, atol=0)
    unit_bytes = Geometry(SHAPE, 4).unit_bytes(SPEC.block_tokens, 4)
    assert (done.move_id, done.rank, done.bytes) == (7, 0, 3 * unit_bytes)


def test_units_may_trade_places_within_one_message(shared: Shared):
    before = units(shared, 2).clone()
    mover(shared, 2).move(Move(1, [Pull(2, [1, 2], [2, 3]), Pull(2, [3], [1])]))
    torch.testing.assert_close(units(shared, 2)[:, [2, 3, 1]], before[:, [1, 2, 3]])


def test_rows_come_along_up_to_their_length(shared: Shared):
    rows = memory_of(shared)[1]
    own = rows[0].clone()
    mover(shared, 0).move(Move(1, [], [RowPull(3, 2, 5, 6)]))
    assert rows[0][5].tolist() == rows[3][2, :6].tolist() + own[5, 6:].tolist()


def test_it_waits_for_the_peers_it_is_told_to_wait_for(shared: Shared):
    with pytest.raises(WorkerDied, match=r"rank 2 to complete message 1; it is at 0"):
        mover(shared, 0, timeout_s=0.05).move(Move(1, [], [], [(1, 0), (2, 1)]))
    Progress(shared.progress).advance(2)
    mover(shared, 0, timeout_s=0.05).move(Move(1, [], [], [(1, 0), (2, 1)]))


# --- from lane to lane --------------------------------------------------------------------------

SRC_UNIT, DST_UNIT = 16, 24
"""Where the block's page begins in each rank's arena, before and after; aligned for any page."""


def page(shared: Shared, group: Group, rank: int, first_unit: int) -> torch.Tensor:
    """[2, layers, heads, block_tokens, head_dim]: the lane's page of `rank` that starts there."""
    per_page = len(page_units(group, rank, NUM_UNITS))
    return memory_of(shared)[0][rank].pages(group.degree).kv[:, :, first_unit // per_page]


def by_shard(group: Group) -> list[int]:
    return sorted(group.ranks, key=group.shard_of)


def move_block(shared: Shared, src: Group, dst: Group, fault: Fault | None = None) -> None:
    """Every destination rank obeys the one message that `moves` makes for it."""
    for rank in dst.ranks:
        own = [move for move in moves(src, dst, NUM_UNITS) if move.dst_rank == rank]
        pulls = [
            Pull(
                peer,
                [SRC_UNIT + m.src_unit for m in own if m.src_rank == peer],
                [DST_UNIT + m.dst_unit for m in own if m.src_rank == peer],
            )
            for peer in sorted({move.src_rank for move in own})
        ]
        mover(shared, rank, fault).move(Move(1, pulls, [RowPull(src.leader, 0, 1, 3)]))


def move_and_compare(shared: Shared, src: Group, dst: Group, fault: Fault | None = None) -> bool:
    """Whether the destination lane reads the heads that the source lane wrote."""
    block = torch.randn(2, SHAPE.num_layers, 4, SPEC.block_tokens, SHAPE.head_dim)
    for shard, rank in enumerate(by_shard(src)):
        page(shared, src, rank, SRC_UNIT).copy_(block.chunk(src.degree, 2)[shard])
    move_block(shared, src, dst, fault)
    moved = torch.cat([page(shared, dst, rank, DST_UNIT) for rank in by_shard(dst)], 2)
    return torch.equal(moved, block)


@pytest.mark.parametrize("src", all_groups(NUM_RANKS), ids=str)
@pytest.mark.parametrize("dst", all_groups(NUM_RANKS), ids=str)
def test_a_block_arrives_whole_in_every_other_lane(shared: Shared, src: Group, dst: Group):
    assert move_and_compare(shared, src, dst)


@pytest.mark.parametrize("fault", ["swap-heads", "stale-block", "lost-tail"])
@pytest.mark.parametrize(
    ("src", "dst"),
    [(Group(1, 0), Group(4, 0)), (Group(4, 0), Group(2, 1)), (Group(1, 2), Group(1, 0))],
)
def test_planted_faults_do_damage(shared: Shared, src: Group, dst: Group, fault: Fault):
    assert not move_and_compare(shared, src, dst, fault)


def test_the_lost_tail_is_the_last_token_too(shared: Shared):
    rows = memory_of(shared)[1]
    old = rows[0][5].tolist()
    mover(shared, 0, "lost-tail").move(Move(1, [], [RowPull(3, 2, 5, 6)]))
    assert rows[0][5].tolist() == rows[3][2, :5].tolist() + old[5:]
