"""`moves()` over all pairs of lanes up to 8 ranks, replicas included."""

import itertools

import pytest

from nitsum.kv.moves import moves, page_units
from nitsum.plan import Group, all_groups

GROUPS = all_groups(8)


def store(group: Group, num_units: int) -> dict[tuple[int, int], int]:
    """What (rank, page unit) holds which unit of the block."""
    return {
        (rank, offset): unit
        for rank in group.ranks
        for offset, unit in enumerate(page_units(group, rank, num_units))
    }


@pytest.mark.parametrize("num_units", [1, 2, 4, 8])
def test_every_destination_gets_exactly_its_units(num_units: int):
    for src, dst in itertools.product(GROUPS, GROUPS):
        have = store(src, num_units)
        got = {
            (m.dst_rank, m.dst_unit): have[m.src_rank, m.src_unit]
            for m in moves(src, dst, num_units)
        }
        assert got == store(dst, num_units), (src, dst)


@pytest.mark.parametrize("num_units", [1, 2, 4, 8])
def test_what_is_on_the_right_rank_stays_there(num_units: int):
    for src, dst in itertools.product(GROUPS, GROUPS):
        have = set(store(src, num_units).items())
        for move in moves(src, dst, num_units):
            unit = store(dst, num_units)[move.dst_rank, move.dst_unit]
            held = any(rank == move.dst_rank and u == unit for (rank, _), u in have)
            assert held == (move.src_rank == move.dst_rank)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_doubling_pulls_the_other_half_from_the_partner(degree: int):
    """Rank i keeps its half and takes the rest from i XOR degree alone."""
    src_pair = [Group(degree, 0), Group(degree, 1)]
    dst = Group(2 * degree, 0)
    for src in src_pair:
        for move in moves(src, dst, 8):
            if move.dst_rank in src.ranks:
                assert move.src_rank == move.dst_rank
            else:
                assert move.src_rank == move.dst_rank ^ degree


def test_replicas_share_the_sending():
    """With one unit on eight ranks, four receivers elsewhere take it from different holders."""
    senders = [move.src_rank for move in moves(Group(4, 0), Group(4, 1), 1)]
    assert sorted(senders) == [0, 1, 2, 3]
