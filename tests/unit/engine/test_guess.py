"""Which step times a server begins with."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import as_file
from pathlib import Path

import pytest

from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.protocol import CostModel
from nitsum.cost.shapes import SHAPES
from nitsum.cost.shipped import shipped_table
from nitsum.cost.table import TableCost
from nitsum.engine.guess import first_guess, given_cost, guess_words
from nitsum.errors import ConfigError
from nitsum.plan import read_plans
from nitsum.shape import ModelShape

SHAPE = SHAPES["Llama-3.1-8B"]
H100 = "NVIDIA H100 80GB HBM3"
CONFIG = EngineConfig(
    model="none", plans=read_plans(["2xTP1", "TP2"], 2), device="cuda", dtype="bfloat16"
)


def guess(config: EngineConfig, shape: ModelShape, driver_name: str) -> CostModel:
    return first_guess(config, shape, driver_name, given_cost(config))


def test_a_server_begins_with_the_table_of_its_gpus_and_its_model():
    cost = guess(CONFIG, SHAPE, H100)
    assert isinstance(cost, TableCost)
    assert cost.table.model == "Llama-3.1-8B"
    words = guess_words(cost, CONFIG, H100)
    assert "measured with Llama-3.1-8B on 2x NVIDIA H100 80GB HBM3" in words


@pytest.mark.parametrize("driver_name", ["NVIDIA H100 PCIe", "NVIDIA H200", "", "NVIDIA L4"])
def test_what_was_measured_on_other_gpus_is_not_for_these(driver_name: str):
    assert isinstance(guess(CONFIG, SHAPE, driver_name), AnalyticCost)


def test_what_was_measured_of_another_model_is_not_for_this_one():
    other = replace(SHAPE, vocab_size=32_768)
    assert isinstance(guess(CONFIG, other, H100), AnalyticCost)
    assert isinstance(guess(replace(CONFIG, dtype="float32"), SHAPE, H100), AnalyticCost)


@pytest.mark.parametrize(
    ("driver_name", "machine"),
    [
        ("NVIDIA A100-SXM4-80GB", "2xA100-80GB"),
        ("NVIDIA H200", "2xH200-141GB"),
    ],
)
def test_the_analytic_model_is_of_the_gpus_there_are(driver_name: str, machine: str):
    cost = guess(CONFIG, SHAPE, driver_name)
    words = guess_words(cost, CONFIG, driver_name)
    assert words == f"Step times to begin with: an analytic model of {machine}."


@pytest.mark.parametrize(
    ("driver_name", "said"), [("NVIDIA L4", "NVIDIA L4 is unknown"), ("", "this GPU is unknown")]
)
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, cost="analytic")])
def test_on_an_unknown_gpu_it_is_said_what_was_taken_and_how_to_measure(
    config: EngineConfig, driver_name: str, said: str
):
    words = guess_words(guess(config, SHAPE, driver_name), config, driver_name)
    assert "an analytic model of 2xH100-80GB, since " + said in words
    assert "`nitsum profile none --ranks 2 --device cuda -o cost.json`" in words
    assert "`--cost cost.json`" in words


def test_a_cpu_is_a_machine_of_its_own():
    config = replace(CONFIG, device="cpu", dtype="float32")
    cost = guess(config, SHAPE, "")
    assert guess_words(cost, config, "") == "Step times to begin with: an analytic model of 2xCPU."


def test_it_is_analytic_where_that_is_asked_for():
    config = replace(CONFIG, cost="analytic")
    assert isinstance(guess(config, SHAPE, H100), AnalyticCost)


def test_a_file_is_used_whatever_the_machine_and_read_before_workers_start(tmp_path: Path):
    with pytest.raises(ConfigError, match="Cannot read"):
        given_cost(replace(CONFIG, cost=str(tmp_path / "none.json")))
    table = shipped_table(SHAPE, Machine.parse("2xH100"), "bfloat16")
    assert table is not None
    with as_file(table) as path:
        config = replace(CONFIG, cost=str(path))
        given = given_cost(config)
        assert first_guess(config, SHAPE, "NVIDIA L4", given) is given
        plans = read_plans(["TP4"], 4)
        with pytest.raises(ConfigError, match="no steps at TP4"):
            given_cost(replace(config, plans=plans))
