"""The analytic model: monotone, right in the limits, and near what machines measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.cost.analytic import AnalyticCost, step_work
from nitsum.cost.machines import Machine
from nitsum.cost.rates import rates_for
from nitsum.cost.shapes import SHAPES, shape_named
from nitsum.errors import ConfigError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

LLAMA_8B = SHAPES["Llama-3.1-8B"]
COST = AnalyticCost(LLAMA_8B, Machine.parse("8xH100"))

counts = st.integers(0, 4000)
batches = st.builds(
    BatchShape, st.integers(0, 512), st.integers(0, 10**6), counts, st.integers(0, 10**7), counts
)


def lane(degree: int) -> Lane:
    return Lane(Group(degree, 0))


def decode(num: int, context: int) -> BatchShape:
    return BatchShape(num, num * context, 0, 0, num)


def prefill(num_tokens: int) -> BatchShape:
    return BatchShape(0, 0, num_tokens, num_tokens * (num_tokens + 1) // 2, 1)


@given(batches, batches, st.sampled_from((1, 2, 4, 8)))
def test_more_work_never_takes_less_time(a: BatchShape, b: BatchShape, degree: int) -> None:
    more = BatchShape(*(x + y for x, y in zip(a, b, strict=True)))
    assert COST.step_time(lane(degree), more) >= COST.step_time(lane(degree), a)


@given(batches, st.sampled_from((1, 2, 4, 8)))
def test_parts_add_up_to_the_step(batch: BatchShape, degree: int) -> None:
    total = COST.parts(degree, batch).total_s
    assert COST.step_time(lane(degree), batch) == pytest.approx(total)


@given(batches.filter(lambda b: b.num_decode > 0))
def test_no_step_beats_the_floor(batch: BatchShape) -> None:
    gpu = COST.machine.gpu
    floor = step_work(COST.geometry, 2, batch).num_bytes / gpu.memory_bytes_per_s
    full = batch._replace(num_samples=max(1, batch.num_samples))
    assert COST.step_time(lane(2), full) > floor


# Decode steps and lone prefills of vLLM 0.24 on 2x H100 80GB with 512-token prompts and 128
# outputs, milliseconds (TP 1, TP 2), measured 2026-11-23; the mean context is 576.
PEER_DECODE = {
    1: (6.54, 4.22),
    8: (6.78, 4.42),
    32: (7.58, 4.99),
    64: (8.63, 5.52),
    128: (10.80, 6.78),
    256: (15.62, 9.61),
}


@pytest.mark.parametrize("num_decode", PEER_DECODE)
def test_decode_steps_are_near_a_measured_engine(num_decode: int) -> None:
    for degree, measured_ms in zip((1, 2), PEER_DECODE[num_decode], strict=True):
        predicted = COST.step_time(lane(degree), decode(num_decode, 576))
        assert predicted * 1e3 == pytest.approx(measured_ms, rel=0.06)


def test_long_prefill_is_near_a_measured_engine() -> None:
    assert COST.step_time(lane(1), prefill(4096)) * 1e3 == pytest.approx(104.0, rel=0.06)
    assert COST.step_time(lane(2), prefill(4096)) * 1e3 == pytest.approx(66.1, rel=0.10)


def test_wide_lanes_win_latency_and_narrow_ones_throughput() -> None:
    one, eight = lane(1), lane(8)
    assert COST.step_time(eight, decode(1, 1024)) < COST.step_time(one, decode(1, 1024))
    # Eight TP-1 lanes with a prompt each against one TP-8 lane with all eight.
    all_eight = BatchShape(0, 0, 8 * 2048, 8 * 2048 * 2049 // 2, 8)
    assert COST.step_time(one, prefill(2048)) < COST.step_time(eight, all_eight)


def test_a_prompt_costs_its_products() -> None:
    matrices = LLAMA_8B.num_params - 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    work = step_work(COST.geometry, 1, BatchShape(prefill_tokens=1000))
    assert work.flops == 2 * 1000 * matrices


def test_unknown_degree_says_which_exist() -> None:
    cost = AnalyticCost(SHAPES["Llama-3.1-70B"], Machine.parse("8xA100-80GB"), min_tp=4)
    assert cost.degrees == (4, 8)
    with pytest.raises(ConfigError, match=r"TP2.*\(4, 8\)"):
        cost.step_time(lane(2), decode(1, 1))


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_has_costs_on_every_machine(name: str) -> None:
    for text in ("2xA100-80GB", "8xA100-40GB", "4xH200", "4xCPU"):
        machine = Machine.parse(text)
        cost = AnalyticCost(shape_named(name), machine)
        assert all(0 < cost.step_time(lane(d), decode(4, 100)) < 600 for d in cost.degrees)


def test_scaled_rates_follow_the_peaks() -> None:
    h100, h200 = rates_for(Machine.parse("H100").gpu), rates_for(Machine.parse("H200").gpu)
    assert h200.gemm.flops_per_s == h100.gemm.flops_per_s
    assert h200.gemm.bytes_per_s == pytest.approx(h100.gemm.bytes_per_s * 4.8 / 3.35)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3.1-8B", 8.03),
        ("Llama-3.1-70B", 70.6),
        ("Llama-3.1-405B", 405.9),
        ("Qwen2.5-7B", 7.62),
        ("Qwen2.5-72B", 72.7),
        ("Qwen3-32B", 32.8),
        ("Qwen3-0.6B", 0.596),
        ("SmolLM2-135M", 0.1345),
        ("Llama-3.2-1B", 1.236),
        ("Qwen2.5-0.5B", 0.494),
    ],
)
def test_shapes_have_the_published_number_of_weights(name: str, billions: float) -> None:
    assert shape_named(name).num_params / 1e9 == pytest.approx(billions, rel=0.005)


def test_machines_are_read_and_wrong_ones_refused() -> None:
    assert str(Machine.parse("8xA100-80GB")) == "8xA100-80GB"
    assert Machine.parse("h200") == Machine.parse("1xH200-141GB")
    with pytest.raises(ConfigError, match="power of two"):
        Machine.parse("3xH100")
    with pytest.raises(ConfigError, match="Known: A100-40GB"):
        Machine.parse("2xTPU")
    with pytest.raises(ConfigError, match="neither a folder"):
        shape_named("no-such-model")
