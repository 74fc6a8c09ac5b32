"""Groups, lanes, plans: how they are written, what is refused, and how shards nest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.errors import ConfigError
from nitsum.plan import (
    Group,
    Lane,
    Plan,
    PlanSet,
    all_groups,
    bit_reverse,
    check_plan,
    default_plans,
    parse_plan,
    read_plans,
)

DEGREES = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


def groups_of(text: str, num_ranks: int) -> list[tuple[int, int]]:
    return [(g.degree, g.index) for g in parse_plan(text, num_ranks).groups]


# --- groups --------------------------------------------------------------------------------------


@given(DEGREES, st.integers(0, 7))
def test_every_shard_is_held_by_exactly_one_rank(degree: int, index: int):
    group = Group(degree, index)
    assert sorted(group.shard_of(rank) for rank in group.ranks) == list(range(degree))
    assert all(group.rank_of_shard(group.shard_of(rank)) == rank for rank in group.ranks)


@given(DEGREES.filter(lambda degree: degree > 1), st.integers(0, 511))
def test_the_shard_at_a_doubled_degree_lies_inside_the_shard_at_this_one(wide: int, rank: int):
    """In units of 1/wide of the model: [s, s+1) inside [2n, 2n+2)."""
    narrow = wide // 2
    wide_shard = Group(wide, rank // wide).shard_of(rank)
    narrow_shard = Group(narrow, rank // narrow).shard_of(rank)
    assert wide_shard // 2 == narrow_shard


@given(DEGREES, DEGREES, st.integers(0, 511))
def test_shards_nest_over_any_number_of_levels(one: int, other: int, rank: int):
    """What min_tp > 1 rests on: the resident 1/min_tp contains every shard above it."""
    narrow, wide = sorted((one, other))
    wide_shard = Group(wide, rank // wide).shard_of(rank)
    assert wide_shard * narrow // wide == Group(narrow, rank // narrow).shard_of(rank)


@given(st.integers(0, 10).flatmap(lambda n: st.tuples(st.integers(0, 2**n - 1), st.just(n))))
def test_bit_reversal_undoes_itself(value_and_bits: tuple[int, int]):
    value, bits = value_and_bits
    assert bit_reverse(bit_reverse(value, bits), bits) == value


def test_bit_reversal_of_eight():
    assert [bit_reverse(value, 3) for value in range(8)] == [0, 4, 2, 6, 1, 5, 3, 7]


def test_all_groups_of_eight_ranks_come_widest_first():
    groups = all_groups(8)
    assert len(groups) == 15
    assert [g.degree for g in groups] == [8, 4, 4, 2, 2, 2, 2, *[1] * 8]
    assert all_groups(8, min_degree=4) == groups[:3]


@given(DEGREES, DEGREES, st.integers(0, 7), st.integers(0, 7))
def test_groups_overlap_when_they_share_a_rank(d1: int, d2: int, i1: int, i2: int):
    one, other = Group(d1, i1), Group(d2, i2)
    assert one.overlaps(other) == bool(set(one.ranks) & set(other.ranks))


def test_a_group_names_its_degree_and_ranks():
    assert str(Group(1, 3)) == "TP1@3"
    assert str(Group(4, 1)) == "TP4@4-7"


# --- shorthand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "num_ranks", "expected"),
    [
        ("TP1", 1, [(1, 0)]),
        ("4xTP1", 4, [(1, 0), (1, 1), (1, 2), (1, 3)]),
        ("2xTP2", 4, [(2, 0), (2, 1)]),
        ("TP2+2xTP1", 4, [(2, 0), (1, 2), (1, 3)]),
        ("2xTP1+TP2", 4, [(1, 0), (1, 1), (2, 1)]),
        ("tp2 + 2xtp1", 4, [(2, 0), (1, 2), (1, 3)]),
        ("TP2/2xTP1", 2, [(2, 0), (1, 0), (1, 1)]),
        ("TP2/2xTP1+TP2", 4, [(2, 0), (1, 0), (1, 1), (2, 1)]),
    ],
)
def test_shorthand(text: str, num_ranks: int, expected: list[tuple[int, int]]):
    assert groups_of(text, num_ranks) == expected


@pytest.mark.parametrize(
    ("text", "num_ranks", "complaint"),
    [
        ("TP1+TP2+TP1", 4, "TP2 would start at rank 1.*Put wider lanes first"),
        ("TP3", 4, "cannot read 'TP3'"),
        ("TP0", 4, "cannot read 'TP0'"),
        ("", 4, "cannot read ''"),
        ("TP2++TP2", 4, "cannot read ''"),
        ("four lanes", 4, "joined by"),
        ("TP2", 4, "leaves rank 2 without a lane"),
        ("TP8", 4, "uses rank 7; there are 4"),
        ("TP4/TP4", 4, "names the same ranks twice"),
        ("0xTP1", 1, "cannot read '0xTP1'"),
    ],
)
def test_what_is_refused(text: str, num_ranks: int, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        parse_plan(text, num_ranks)


@given(st.lists(DEGREES, min_size=1, max_size=6))
def test_widest_first_always_aligns(degrees: list[int]):
    """Put wider lanes first, says the error; then it must hold."""
    ordered = sorted(degrees, reverse=True)
    plan_groups = [
        lane.group for lane in parse_plan("+".join(f"TP{d}" for d in ordered), sum(ordered)).lanes
    ]
    assert [g.degree for g in plan_groups] == ordered
    assert [rank for g in plan_groups for rank in g.ranks] == list(range(sum(ordered)))


def test_tiers_follow_the_width_where_widths_differ():
    wide, narrow, _ = parse_plan("TP2+2xTP1", 4).lanes
    assert wide.serves("priority")
    assert not narrow.serves("priority")
    assert narrow.serves("batch")
    assert not wide.serves("batch")
    assert all(lane.serves("anything") for lane in parse_plan("2xTP2", 4).lanes)


def test_roles_in_shorthand():
    plan = parse_plan("TP2-prefill+2xTP1-decode", 4)
    assert [(str(lane), lane.role, lane.tiers) for lane in plan.lanes] == [
        ("TP2@0-1", "prefill", ()),
        ("TP1@2", "decode", ()),
        ("TP1@3", "decode", ()),
    ]
    assert plan.has_roles
    assert [lane.role for lane in plan.followers] == ["decode", "decode"]


def test_decode_lanes_need_somebody_who_hands_over():
    with pytest.raises(ConfigError, match="no prefill lane"):
        parse_plan("TP2+2xTP1-decode", 4)


def test_an_overlay_is_a_plan_whose_lanes_share_ranks():
    assert parse_plan("TP2/2xTP1", 2).is_overlay
    assert not parse_plan("TP2+2xTP1", 4).is_overlay


# --- plan sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
def test_default_plans(num_ranks: int):
    plans = default_plans(num_ranks)
    names = [plan.name for plan in plans.plans]
    assert len(set(names)) == len(names)
    assert plans[plans.initial] is plans.plans[0]
    assert plans.max_tp == num_ranks
    assert any(plan.is_overlay for plan in plans.plans) == (num_ranks > 1)
    for plan in plans.plans:
        assert check_plan(plan, num_ranks) is plan


@pytest.mark.parametrize("num_ranks", [0, 3, 6, -2])
def test_ranks_come_in_powers_of_two(num_ranks: int):
    with pytest.raises(ConfigError, match="power of two"):
        default_plans(num_ranks)


def test_groups_of_a_set_are_each_named_once_in_the_common_order():
    plans = read_plans(["2xTP1", "TP2", "TP2/2xTP1"], 2)
    assert plans.groups == (Group(2, 0), Group(1, 0), Group(1, 1))
    assert plans.degrees == (1, 2)
    assert plans.max_tp == 2


def test_lanes_are_found_by_group():
    plan = parse_plan("TP2+2xTP1", 4)
    assert plan.lane_of(Group(2, 0)) == plan.lanes[0]
    assert plan.lane_of(Group(2, 1)) is None


def test_an_unknown_plan_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"Unknown plan 'TP9'. This server holds: 2xTP1, TP2"):
        _ = PlanSet(2, default_plans(2).plans[:2], "TP2")["TP9"]


# --- plans in full -------------------------------------------------------------------------------

SPLIT = {
    "name": "split",
    "lanes": [
        {"ranks": [0, 1], "role": "prefill"},
        {"ranks": [2, 3], "role": "decode", "tiers": ["priority"]},
    ],
}


def test_lanes_in_full():
    plan = read_plans([SPLIT, "TP4"], 4, "TP4")["split"]
    assert plan.lanes == (
        Lane(Group(2, 0), "prefill"),
        Lane(Group(2, 1), "decode", ("priority",)),
    )


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"name": "a", "lanes": [{"ranks": [1, 2]}]}, "not an aligned group"),
        ({"name": "a", "lanes": [{"ranks": [1, 0]}]}, "not an aligned group"),
        ({"name": "a", "lanes": [{"ranks": [0, 1, 2]}]}, "not an aligned group"),
        ({"name": "a", "lanes": [{"ranks": []}]}, "not an aligned group"),
        ({"name": "a", "lanes": [{"ranks": [0, 1], "rolle": "decode"}]}, "rolle"),
        ({"name": "a", "lanes": [{"ranks": [0, 1], "role": "cook"}]}, "cook"),
        ({"lanes": []}, "name"),
        (7, "Plan file"),
    ],
)
def test_what_is_refused_in_full(entry: object, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        read_plans([entry], 2)


def test_a_plan_must_be_able_to_finish_a_request():
    lanes = tuple(Lane(Group(1, rank), "prefill") for rank in range(2))
    with pytest.raises(ConfigError, match="only prefill lanes"):
        check_plan(Plan("half", lanes), 2)


@pytest.mark.parametrize(
    ("entries", "initial", "complaint"),
    [
        ([], None, "holds no plans"),
        (["TP2", "TP2"], None, "must be unique"),
        (["TP2"], "TP4", "Unknown plan 'TP4'"),
    ],
)
def test_what_is_refused_of_sets(entries: list[object], initial: str | None, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        read_plans(entries, 2, initial)
