"""What a layout sustains, and what two phases in turns can gain."""

import pytest

from nitsum.control.gain import most_gain, sustained
from nitsum.control.load import sum_up, tier_sample
from nitsum.control.score import Limits, Scorer
from nitsum.control.steps import StepTimes
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.plan import parse_plan
from nitsum.tier import DEFAULT


def test_phases_that_want_the_same_layout_gain_nothing():
    assert most_gain([4.0, 2.0], [9.0, 8.0]) == pytest.approx(1.0)


def test_phases_that_want_different_layouts_gain_what_a_compromise_loses():
    # Each layout serves half of the other's phase: the best single one makes 3/4 of both.
    assert most_gain([4.0, 2.0], [1.0, 2.0]) == pytest.approx(4 / 3, rel=0.01)
    # A third layout that is nearly as good in both leaves little.
    assert most_gain([4.0, 2.0, 3.8], [1.0, 2.0, 1.9]) == pytest.approx(1 / 0.95, rel=0.01)


def test_a_sustained_load_is_served_in_time_and_a_little_more_is_not():
    cost = AnalyticCost(shape_named("Llama-3.1-8B"), Machine.parse("2xH100-80GB"), max_tp=2)
    scorer = Scorer(StepTimes(cost, (1, 2)), Limits(256, 2048, lambda _degree: 4e5))
    plan = parse_plan("TP2", 2)
    load = (sum_up(DEFAULT, [tier_sample(DEFAULT, 1000)] * 8, rate_per_s=1.0, output_tokens=100),)
    factor = sustained(scorer, plan, load)
    assert factor > 1.0
    for scale, holds in ((0.99, True), (1.05, False)):
        more = (load[0].scaled(factor * scale),)
        served = scorer.score(plan, more).feasible_per_s
        assert (served >= 0.95 * more[0].rate_per_s) is holds


def test_a_target_below_a_lone_step_is_never_sustained():
    cost = AnalyticCost(shape_named("Llama-3.1-8B"), Machine.parse("2xH100-80GB"), max_tp=2)
    scorer = Scorer(StepTimes(cost, (2,)), Limits(256, 2048, lambda _degree: 4e5))
    sample = tier_sample(DEFAULT, 1000)._replace(ttft_s=1e-4)
    load = (sum_up(DEFAULT, [sample] * 8, rate_per_s=1.0, output_tokens=100),)
    assert sustained(scorer, parse_plan("TP2", 2), load) == 0.0
