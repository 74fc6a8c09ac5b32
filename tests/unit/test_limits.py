"""Sizes of steps and blocks: what is simulated and planned is what is served on such a machine."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from nitsum.bench import cuda_engine, switch_load
from nitsum.cli.build import build_engine_config
from nitsum.cli.settings import ServeSettings
from nitsum.cli.simulate_settings import SimulateSettings, build_site
from nitsum.config import EngineConfig
from nitsum.control import planner
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.errors import ConfigError
from nitsum.limits import STEP_LIMITS, StepLimits, step_limits
from nitsum.messages import Device
from nitsum.plan import default_plans
from nitsum.sim.system import Site, static_system, uniform_plan
from tests.shapes import TINY_LLAMA

MODEL = "Llama-3.1-8B"
MACHINES: list[tuple[str, Device]] = [("2xH100-80GB", "cuda"), ("2xCPU", "cpu")]


def of_config(config: EngineConfig) -> StepLimits:
    return StepLimits(
        config.block_tokens, config.max_num_seqs, config.max_batch_tokens, config.mixed_tokens
    )


def served(device: Device, **settings: int) -> StepLimits:
    told = ServeSettings(model="m", device=device, ranks=2, **settings)  # type: ignore[arg-type]
    return of_config(build_engine_config(told, Path("m")))


@pytest.mark.parametrize(("machine", "device"), MACHINES)
@pytest.mark.parametrize(
    "settings", [{}, {"max_batch_tokens": 4096}, {"max_mixed_tokens": 256, "block_tokens": 64}]
)
def test_a_twin_has_the_sizes_of_what_is_served(
    machine: str, device: Device, settings: dict[str, int]
):
    told = SimulateSettings(model="Qwen2.5-0.5B", machine=machine, **settings)  # type: ignore[arg-type]
    site, _ = build_site(told, None)
    system = static_system(site, uniform_plan(2, 2), "nitsum")
    assert of_config(system.config) == served(device, **settings)
    assert system.arena.block_tokens == served(device, **settings).block_tokens


@pytest.mark.parametrize(("machine", "device"), MACHINES)
def test_a_twin_copies_ahead_as_much_as_a_server_at_a_time(machine: str, device: Device):
    site, _ = build_site(SimulateSettings(model="Qwen2.5-0.5B", machine=machine), None)
    system = static_system(site, uniform_plan(2, 2), "nitsum")
    told = ServeSettings(model="m", device=device, ranks=2)
    config = build_engine_config(told, Path("m"))
    assert system.config.units_under_way == config.units_under_way


@pytest.mark.parametrize(("machine", "device"), MACHINES)
def test_plans_are_judged_by_the_sizes_of_what_is_served(machine: str, device: Device):
    here = Machine.parse(machine)
    assert here.device == device
    assert Site(model=MODEL, shape=shape_named(MODEL), machine=here).limits == STEP_LIMITS[device]
    site = planner.PlanSite(shape=shape_named(MODEL), machine=here)
    assert site.limits == STEP_LIMITS[device]
    assert site.lane_limits(site.memory(1, 2)).max_batch_tokens == served(device).max_mixed_tokens


def test_an_engine_without_words_has_what_cpu_ranks_have():
    assert of_config(EngineConfig(model="m", plans=default_plans(2))) == served("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_benchmarks_of_switches_have_the_blocks_of_what_is_served(device: Device, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    options = switch_load.Options(model=tmp_path, plans=default_plans(2), device=device)
    config = switch_load.engine_config(options)
    assert config.block_tokens == served(device).block_tokens
    tails = islice(switch_load.background(options, vocab_size=100), 50)
    assert max(len(request.prompt) for request in tails) > 4 * config.block_tokens


def test_the_benchmark_of_the_gpu_engine_has_the_blocks_of_what_is_served(tmp_path: Path):
    config = cuda_engine.engine_config(cuda_engine.Options(model=tmp_path))
    assert config.block_tokens == served("cuda").block_tokens


def test_a_bound_on_any_step_bounds_those_with_decodes():
    assert step_limits("cuda", max_batch_tokens=512) == StepLimits(32, 256, 512, 512)
    assert step_limits("cuda", max_batch_tokens=512, max_mixed_tokens=300).max_mixed_tokens == 300
    with pytest.raises(ConfigError, match="no step may exceed"):
        step_limits("cuda", max_mixed_tokens=4096)
