"""The score of a plan: what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nitsum.control.classes import Shape
from nitsum.control.load import Load, Sample, TierLoad, by_level, scaled, sum_up
from nitsum.control.score import Limits, Scorer
from nitsum.control.steps import StepTimes
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.protocol import FixedCost
from nitsum.cost.shapes import shape_named
from nitsum.plan import Group, Lane, Plan, default_plans, parse_plan
from nitsum.step import BatchShape
from nitsum.tier import DEFAULT_TIERS, TierSet

COST = AnalyticCost(shape_named("Llama-3.1-8B"), Machine.parse("8xH100-80GB"))
TIERS = TierSet()


def tier_load(name: str, rate: float, prompt: int = 1000, output: int = 200) -> TierLoad:
    tier = TIERS[name]
    samples = [
        Sample(n, tier.ttft_s, tier.tpot_s, tier.deadline_s)
        for n in (prompt // 4, prompt // 2, prompt, 2 * prompt)
    ]
    return sum_up(tier, samples, rate_per_s=rate, output_tokens=output)


def mixed_load(rate: float) -> Load:
    return by_level([tier_load("priority", rate), tier_load("default", 2 * rate)])


def scorer(kv_tokens: float = 1e6) -> Scorer:
    steps = StepTimes(COST, COST.degrees)
    return Scorer(steps, Limits(256, 2048, lambda degree: kv_tokens * degree))


def test_step_times_follow_the_cost_model():
    steps = StepTimes(COST, COST.degrees)
    for degree in COST.degrees:
        for num_decode, context, chunk in ((1, 100, 0), (32, 32_000, 0), (8, 8_000, 512)):
            batch = BatchShape(num_decode, context, chunk, chunk * chunk // 2, num_decode)
            exact_s = COST.step_time(Lane(Group(degree, 0)), batch)
            found_s = steps.seconds(degree, num_decode, context, chunk, chunk / 2)
            assert found_s == pytest.approx(exact_s, rel=0.1)


def test_a_correction_stretches_steps():
    steps = StepTimes(FixedCost(), [1])
    before_s = steps.seconds(1, 4, 0, 0, 0)
    steps.factors = {1: 1.5}
    assert steps.seconds(1, 4, 0, 0, 0) == pytest.approx(1.5 * before_s)


def test_a_degree_that_never_ran_is_corrected_like_those_that_did():
    """Else a layout in force is judged by the machine and the others by a table that is wrong."""
    steps = StepTimes(FixedCost(), [1, 2, 4])
    before_s, alone_s = steps.seconds(4, 4, 0, 0, 0), steps.decode_s(4)
    steps.factors = {1: 0.6, 2: 0.8}
    assert steps.seconds(4, 4, 0, 0, 0) == pytest.approx(0.7 * before_s)
    assert steps.decode_s(4) == pytest.approx(0.7 * alone_s)
    assert steps.seconds(1, 4, 0, 0, 0) == pytest.approx(0.6 * before_s)


@pytest.mark.parametrize("plan", default_plans(8).plans, ids=lambda plan: plan.name)
def test_no_plan_serves_more_than_arrives_in_time(plan: Plan):
    for rate in (0.1, 1.0, 10.0, 100.0, 1000.0):
        for tier in scorer().score(plan, mixed_load(rate)).tiers:
            assert 0.0 <= tier.feasible_per_s <= tier.rate_per_s * (1 + 1e-9)


@pytest.mark.parametrize("plan", ["8xTP1", "2xTP4", "TP8"])
def test_utilisation_grows_with_the_load(plan: str):
    parsed = parse_plan(plan, 8)
    used = [scorer().score(parsed, mixed_load(rate)).utilisation for rate in (1, 4, 16, 64, 256)]
    assert used == sorted(used)
    assert used[0] < 0.5
    assert used[-1] == pytest.approx(1.0)


def test_a_light_load_is_served_in_time():
    for plan in default_plans(8).plans:
        found = scorer().score(plan, mixed_load(0.5))
        assert found.feasible_per_s == pytest.approx(1.5, rel=0.1), plan.name


def test_narrow_lanes_serve_more_patient_work_than_wide_ones():
    """The premise of all: all-reduces and small shards cost throughput."""
    load = (replace(tier_load("batch", 500.0), deadline_s=60.0),)
    found = {
        plan: scorer().score(parse_plan(plan, 8), load).tiers[0].feasible_per_s
        for plan in ("8xTP1", "4xTP2", "2xTP4", "TP8")
    }
    assert found["8xTP1"] > found["2xTP4"] > found["TP8"]


def test_a_target_below_the_narrow_steps_needs_wide_lanes():
    narrow_s = COST.step_time(Lane(Group(1, 0)), BatchShape(1, 1000, 0, 0, 1))
    load = (replace(tier_load("priority", 1.0), tpot_s=0.7 * narrow_s),)
    assert scorer().score(parse_plan("8xTP1", 8), load).feasible_per_s == 0.0
    assert scorer().score(parse_plan("TP8", 8), load).feasible_per_s > 0.5


def test_prompts_that_no_lane_finishes_in_time_are_not_feasible():
    """Of 5,000, 10,000, 20,000 and 40,000 tokens, one GPU computes two in 300 ms; eight, all."""
    load = (tier_load("priority", 0.01, prompt=20_000),)
    found = {plan: scorer().score(parse_plan(plan, 8), load) for plan in ("8xTP1", "TP8")}
    assert found["8xTP1"].feasible_per_s == pytest.approx(0.005, rel=0.01)
    assert found["TP8"].feasible_per_s > 0.007


def test_urgent_tiers_are_filled_first():
    full = scorer().score(parse_plan("TP8", 8), mixed_load(60.0))
    alone = scorer().score(parse_plan("TP8", 8), (tier_load("priority", 60.0),))
    assert full.tiers[0].feasible_per_s == pytest.approx(alone.tiers[0].feasible_per_s, rel=0.05)
    assert full.tiers[1].feasible_per_s < full.tiers[1].rate_per_s


def test_little_kv_bounds_a_lane():
    load = (tier_load("batch", 100.0),)
    found = scorer(kv_tokens=2000.0).score(parse_plan("8xTP1", 8), load).tiers[0]
    assert found.bound == "kv"
    assert (
        found.feasible_per_s < scorer().score(parse_plan("8xTP1", 8), load).tiers[0].feasible_per_s
    )


def test_lanes_that_share_ranks_share_their_time():
    load = by_level([tier_load("priority", 20.0), tier_load("batch", 2000.0)])
    shared = scorer().score(parse_plan("TP8/8xTP1", 8), load)
    apart = scorer().score(parse_plan("8xTP1", 8), load[1:])
    assert shared.tiers[1].feasible_per_s < apart.tiers[0].feasible_per_s


def test_waiting_requests_count_as_load():
    load = tier_load("default", 1.0)
    idle = scorer().score(parse_plan("TP8", 8), (load,))
    behind = scorer().score(parse_plan("TP8", 8), (replace(load, num_waiting=500),))
    assert behind.utilisation > idle.utilisation


def test_classes_are_counted_not_listed():
    shape = Shape.of(parse_plan("TP4+4xTP1", 8))
    assert [(lane.degree, lane.num_lanes) for lane in shape.classes] == [(4, 1), (1, 4)]
    assert shape.cover == ((1.0, 0.0), (0.0, 1.0))
    overlay = Shape.of(parse_plan("TP2/4xTP1", 4))
    assert overlay.cover == ((1.0, 0.5), (1.0, 1.0))


def test_more_of_everything_is_scaled():
    assert [t.rate_per_s for t in scaled(mixed_load(1.0), 3.0)] == [3.0, 6.0]


def test_probes_stand_for_equal_shares():
    load = sum_up(
        DEFAULT_TIERS[0],
        [Sample(n, 1.0, 1.0, None) for n in range(1, 601)],
        rate_per_s=1.0,
        output_tokens=1.0,
    )
    assert [probe.prompt_tokens for probe in load.probes] == [51, 151, 251, 351, 451, 551]


def test_prefill_and_decode_lanes_bear_what_both_can():
    """Long prompts and short answers starve for prefill lanes, the reverse for decode lanes."""
    even = parse_plan("4xTP1-prefill+4xTP1-decode", 8)
    mostly_prefill = parse_plan("6xTP1-prefill+2xTP1-decode", 8)
    prompts = (tier_load("default", 1000.0, 4000, 8),)
    answers = (tier_load("default", 1000.0, 100, 800),)
    judge = scorer()
    assert judge.score(mostly_prefill, prompts).value > judge.score(even, prompts).value
    assert judge.score(mostly_prefill, answers).value < judge.score(even, answers).value


def test_decode_lanes_keep_a_pace_that_chunks_would_break():
    """In a mixed lane a tight pace leaves small chunks; a prefill lane takes whole ones."""
    tight = replace(tier_load("priority", 1000.0, 4000, 16), tpot_s=0.0045)
    judge = scorer()
    mixed = judge.score(parse_plan("2xTP4", 8), (tight,))
    apart = judge.score(parse_plan("TP4-prefill+TP4-decode", 8), (tight,))
    assert apart.value > 1.2 * mixed.value


def test_roles_share_time_between_tiers():
    judge, plan = scorer(), parse_plan("4xTP1-prefill+4xTP1-decode", 8)
    alone = judge.score(plan, (tier_load("default", 500.0),))
    both = judge.score(plan, by_level([tier_load("priority", 20.0), tier_load("default", 500.0)]))
    assert both.tiers[0].feasible_per_s > 0.0
    assert both.tiers[1].feasible_per_s < alone.tiers[0].feasible_per_s
