"""Layouts that exist, small sets of them, and nodes of a fleet."""

from __future__ import annotations

import random
from importlib.util import find_spec
from itertools import combinations

import pytest

from nitsum.control.load import by_level
from nitsum.control.search import (
    Fleet,
    best_set,
    best_set_by_enumeration,
    charge_of,
    feasible_plans,
    fleet_plan,
)
from nitsum.plan import check_plan, default_plans
from tests.unit.control.test_score import mixed_load, scorer, tier_load


def test_every_plan_is_valid_and_named_once():
    plans = feasible_plans(8, [1, 2, 4, 8])
    for plan in plans:
        check_plan(plan, 8)
    assert len({plan.name for plan in plans}) == len(plans)
    assert len({plan.lanes for plan in plans}) == len(plans)
    assert {plan.name for plan in plans} >= {"8xTP1", "TP8", "TP4+4xTP1", "2xTP4 split"}


def test_all_partitions_into_powers_of_two_are_there():
    """8 = 8, 4+4, 4+2+2, ...: ten ways."""
    plans = feasible_plans(8, [1, 2, 4, 8])
    parts = {
        tuple(sorted(lane.degree for lane in plan.lanes)) for plan in plans if not plan.is_overlay
    }
    assert len(parts) == 10


def test_partitions_in_two_come_with_roles():
    names = {plan.name for plan in feasible_plans(8, [1, 2, 4, 8]) if plan.has_roles}
    assert "TP4-prefill+TP4-decode" in names
    assert {"TP4-prefill+4xTP1-decode", "TP4-decode+4xTP1-prefill"} <= names
    assert {f"{n}xTP1-prefill+{8 - n}xTP1-decode" for n in (2, 4, 6)} <= names


def test_narrow_degrees_can_be_left_out():
    plans = feasible_plans(8, [4, 8])
    assert {lane.degree for plan in plans for lane in plan.lanes} == {4, 8}


def brute_force(values: list[list[float]], num_plans: int) -> float:
    charge = charge_of(values)
    return max(
        sum(map(max, zip(*(values[row] for row in chosen), strict=True))) - charge * len(chosen)
        for size in range(1, num_plans + 1)
        for chosen in combinations(range(len(values)), size)
    )


def worth(values: list[list[float]], chosen: list[int]) -> float:
    total = sum(map(max, zip(*(values[row] for row in chosen), strict=True)))
    return total - charge_of(values) * len(chosen)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_set_is_the_best(seed: int):
    draw = random.Random(seed)
    values = [[draw.random() for _ in range(6)] for _ in range(8)]
    expected = brute_force(values, 3)
    assert worth(values, best_set_by_enumeration(values, 3)) == pytest.approx(expected)
    assert worth(values, best_set(values, 3)) == pytest.approx(expected)


@pytest.mark.skipif(find_spec("highspy") is None, reason="highspy is not installed")
@pytest.mark.parametrize("seed", range(5))
def test_the_solver_agrees(seed: int):
    from nitsum.control.highs import best_set_by_highs

    draw = random.Random(seed)
    values = [[draw.random() for _ in range(6)] for _ in range(8)]
    chosen = best_set_by_highs(values, list(range(8)), 3, charge_of(values))
    assert worth(values, chosen) == pytest.approx(brute_force(values, 3), abs=1e-6)


def test_a_plan_that_brings_nothing_is_left_out():
    assert best_set([[1.0, 1.0], [1.0, 1.0], [0.5, 1.0]], 3) == [0]


def test_a_fleet_is_at_least_as_good_as_its_best_single_plan():
    plans = list(default_plans(8).plans)
    fleet = Fleet(scorer(), plans, 16)
    load = by_level([*mixed_load(300.0), tier_load("batch", 900.0)])
    counts, score = fleet.choose(load)
    assert sum(counts.values()) == 16
    assert score.value >= max(fleet.score({plan.name: 16}, load).value for plan in plans)


def test_a_fleet_is_one_plan_over_all_ranks():
    plans = list(default_plans(4).plans)
    whole = fleet_plan({plans[0].name: 1, plans[-1].name: 3}, plans, 4)
    check_plan(whole, 16)
    assert sum(lane.degree for lane in whole.lanes) == 4 + 3 * sum(
        lane.degree for lane in plans[-1].lanes
    )
