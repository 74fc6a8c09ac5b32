"""KV room against known models and machines."""

from __future__ import annotations

import pytest

from nitsum.cost.machines import Machine
from nitsum.cost.memory import MemoryModel, smallest_min_tp, token_bytes, weight_bytes
from nitsum.cost.shapes import SHAPES
from nitsum.errors import ConfigError
from nitsum.plan import parse_plan
from nitsum.shape import Geometry

LLAMA_8B = SHAPES["Llama-3.1-8B"]


def test_weights_of_an_unpadded_model_are_its_parameters() -> None:
    assert weight_bytes(Geometry(LLAMA_8B, 8)) == 2 * LLAMA_8B.num_params
    assert weight_bytes(Geometry(LLAMA_8B, 8, 4)) == 2 * LLAMA_8B.num_params // 4


def test_a_token_of_8b_takes_128_kib_over_all_ranks() -> None:
    geometry = Geometry(LLAMA_8B, 8)
    for degree in (1, 2, 4, 8):
        assert token_bytes(geometry, degree) * degree == 128 << 10


def test_replicated_heads_take_more_than_their_share() -> None:
    geometry = Geometry(SHAPES["Qwen2.5-7B"], 8)  # 4 KV heads
    assert token_bytes(geometry, 8) == token_bytes(geometry, 4)


@pytest.mark.parametrize(
    ("model", "machine", "min_tp"),
    [
        ("Llama-3.1-8B", "8xA100-80GB", 1),
        ("Llama-3.1-70B", "8xA100-80GB", 4),
        ("Llama-3.1-70B", "8xH200", 2),
        ("Qwen2.5-32B", "8xH100", 2),
    ],
)
def test_smallest_min_tp(model: str, machine: str, min_tp: int) -> None:
    shape = SHAPES[model]
    assert smallest_min_tp(shape, Machine.parse(machine), min_tokens=100_000) == min_tp


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit 8xA100-80GB"):
        smallest_min_tp(SHAPES["Llama-3.1-405B"], Machine.parse("8xA100-80GB"))


def test_plans_without_replicas_hold_the_same_tokens() -> None:
    memory = MemoryModel(Geometry(LLAMA_8B, 8), Machine.parse("8xA100-80GB"))
    room = {
        text: memory.plan_tokens(parse_plan(text, 8))
        for text in ("8xTP1", "TP8", "TP4+4xTP1", "TP8/8xTP1")
    }
    assert max(room.values()) - min(room.values()) <= 8
    assert room["TP8"] == pytest.approx(memory.lane_tokens(8), rel=1e-4)


def test_redundancy_is_what_a_static_layout_gains() -> None:
    memory = MemoryModel(Geometry(LLAMA_8B, 8), Machine.parse("8xA100-80GB"))
    static = memory.static(8)
    lost = weight_bytes(memory.geometry) - weight_bytes(static.geometry)
    assert memory.redundancy_share(8) == pytest.approx(lost / static.arena_bytes, rel=1e-3)
    assert memory.redundancy_share(1) == 0.0


def test_lanes_outside_the_degrees_do_not_fit() -> None:
    memory = MemoryModel(Geometry(LLAMA_8B, 4, 2), Machine.parse("8xA100-80GB"))
    assert [degree for degree in (1, 2, 4, 8) if memory.fits(degree)] == [2, 4]
