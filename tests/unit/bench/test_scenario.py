"""What a verification asks for, before anything runs."""

from collections import Counter
from itertools import islice
from random import Random

import pytest

from nitsum.bench.scenario import Scenario, asks, plan_walk, static_plan, urgent, with_static
from nitsum.bench.verify import check_plans
from nitsum.errors import ConfigError
from nitsum.plan import PlanSet, default_plans, parse_plan

SCENARIO = Scenario(max_tokens=96, seed=5)


def test_the_same_seed_asks_the_same():
    first, second = (list(islice(asks(SCENARIO, 203), 20)) for _ in range(2))
    assert first == second
    other = list(islice(asks(Scenario(max_tokens=96, seed=6), 203), 20))
    assert [ask.request.prompt for ask in other] != [ask.request.prompt for ask in first]


def test_requests_fit_share_prefixes_and_are_of_both_kinds():
    found = list(islice(asks(SCENARIO, 203), 60))
    by_family: dict[int, list[list[int]]] = {}
    for ask in found:
        request = ask.request
        assert len(request.prompt) + request.sampling.max_tokens <= SCENARIO.max_tokens
        assert len(request.prompt) > ask.num_prefix
        assert all(0 <= token < 203 for token in request.prompt)
        if ask.family is not None:
            by_family.setdefault(ask.family, []).append(request.prompt[: ask.num_prefix])
    assert all(prefix == prefixes[0] for prefixes in by_family.values() for prefix in prefixes)
    assert max(len(prefixes) for prefixes in by_family.values()) > 3
    assert {bool(ask.request.sampling.forced_tokens) for ask in found} == {True, False}
    assert len({ask.request.tier for ask in found}) == 3


def test_an_urgent_request_differs_in_its_tier_only():
    ask = next(a for a in asks(SCENARIO, 203) if a.request.tier == "batch")
    assert urgent(ask).request.tier == "priority"
    assert urgent(ask).request.prompt == ask.request.prompt


def test_a_walk_makes_every_change_once_before_any_twice():
    plans = default_plans(4).plans
    steps = list(islice(plan_walk(plans, plans[0].name, Random(1)), 200))
    changes = Counter(zip([plans[0].name, *steps], steps, strict=False))
    assert all(a != b for a, b in changes)
    assert len(changes) == len(plans) * (len(plans) - 1)
    assert max(changes.values()) - min(changes.values()) <= len(plans)


def test_the_static_layout_is_the_narrowest_uniform_one():
    assert static_plan(default_plans(4)).name == "4xTP1"
    two = PlanSet(4, (parse_plan("2xTP2", 4), parse_plan("TP4", 4)), "TP4")
    assert static_plan(two).name == "2xTP2"
    assert with_static(two) is two
    mixed = PlanSet(4, (parse_plan("TP2+2xTP1", 4), parse_plan("TP4", 4)), "TP4")
    assert [plan.name for plan in with_static(mixed).plans] == ["TP2+2xTP1", "TP4", "4xTP1"]


def test_one_plan_is_nothing_to_verify():
    with pytest.raises(ConfigError, match="nothing to switch between"):
        check_plans(default_plans(1))
