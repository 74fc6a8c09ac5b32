"""First requests against later ones, by hand and in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitsum.bench.driver import Driver
from nitsum.bench.first import ClassTimes, Options, Result, classes_of, engine_config, serve_all
from nitsum.bench.virtual import VirtualMachine
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.plan import read_plans


def test_the_worst_class_counts_and_its_first_request_is_not_in_the_median():
    result = Result(
        [
            ClassTimes("TP2", "default", [0.4, 0.4, 9.0], [0.2, 0.2, 0.4]),
            ClassTimes("TP2", "priority", [0.9], [0.3, 0.1, 0.3]),
        ]
    )
    figures = result.figures()
    assert figures["first_request_ttft_ratio"] == pytest.approx(3.0)
    assert figures["first_request_ttft_ms"] == pytest.approx(900.0)
    assert figures["first_request_ttft_ratio_of_all"] == pytest.approx(2.0)
    assert figures["later_request_ttft_p90_ratio"] == pytest.approx(1.8)
    assert figures["num_classes"] == 2


def test_every_tier_of_every_plan_is_served_first_once_the_initial_plan_before_others():
    plans = read_plans(["TP2", "2xTP1"], 2)
    options = Options(model=Path("none"), plans=plans, num_prompt=64, num_rounds=3)
    config, shape = engine_config(options), shape_named("Llama-3.1-8B")
    driver = Driver(config, VirtualMachine(config, shape, Machine.parse("2xH100")))
    result = Result(classes_of(options))
    serve_all(result, options, driver, shape.vocab_size, lambda *_: None)
    tiers = [tier.name for tier in config.tiers]
    assert [(each.plan, each.tier) for each in result.classes] == [
        (plan, tier) for plan in ("TP2", "2xTP1") for tier in tiers
    ]
    assert all((len(each.first_s), len(each.later_s)) == (1, 3) for each in result.classes)
    assert len(driver.reports) == 7, "there, and there and back in each later round"
    assert result.figures()["first_request_ttft_ratio"] == pytest.approx(1.0, abs=0.02)
