"""Reading model configs of all families, and padding that makes every cut come out even."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nitsum.errors import CheckpointError, ConfigError
from nitsum.plan import Group
from nitsum.shape import Geometry, ModelShape, next_power_of_two, round_up

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


# --- reading configs -----------------------------------------------------------------------------


def test_llama():
    shape = ModelShape.from_hf(LLAMA)
    assert shape == ModelShape(
        family="llama",
        num_layers=30,
        hidden_size=576,
        num_q_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_positions=8192,
        rms_eps=1e-5,
        rope=shape.rope,
        tie_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=1,
    )
    assert (shape.rope.kind, shape.rope.theta) == ("default", 100000.0)
    assert shape.q_per_kv == 3
    assert shape.num_params == 134_479_872


@pytest.mark.parametrize(
    ("architecture", "family", "qkv_bias", "o_bias", "qk_norm"),
    [
        ("LlamaForCausalLM", "llama", False, False, False),
        ("MistralForCausalLM", "mistral", False, False, False),
        ("Qwen2ForCausalLM", "qwen2", True, False, False),
        ("Qwen3ForCausalLM", "qwen3", False, False, True),
    ],
)
def test_families(architecture: str, family: str, qkv_bias: bool, o_bias: bool, qk_norm: bool):
    shape = ModelShape.from_hf(config(architectures=[architecture]))
    assert (shape.family, shape.qkv_bias, shape.o_bias, shape.qk_norm) == (
        family,
        qkv_bias,
        o_bias,
        qk_norm,
    )


def test_llama_with_biases():
    shape = ModelShape.from_hf(config(attention_bias=True, mlp_bias=True))
    assert (shape.qkv_bias, shape.o_bias, shape.mlp_bias) == (True, True, True)


def test_fields_that_may_be_left_out():
    left_out = ("num_key_value_heads", "rope_theta", "eos_token_id", "tie_word_embeddings")
    shape = ModelShape.from_hf({k: v for k, v in LLAMA.items() if k not in left_out})
    assert shape.num_kv_heads == 9
    assert shape.rope.theta == 10000.0
    assert shape.eos_token_ids == ()
    assert not shape.tie_embeddings


def test_head_dim_need_not_be_hidden_over_heads():
    assert ModelShape.from_hf(config(head_dim=128)).head_dim == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}},
    ],
    ids=["older", "newer"],
)
def test_llama3_rope_in_both_notations(rope: dict[str, Any]):
    shape = ModelShape.from_hf({k: v for k, v in config(**rope).items() if v is not None})
    assert (shape.rope.kind, shape.rope.theta, shape.rope.factor) == ("llama3", 500000.0, 8.0)
    assert shape.rope.original_max_positions == 8192


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0}},
    ],
)
def test_linear_rope_in_all_notations(rope: dict[str, Any]):
    found = ModelShape.from_hf(config(**rope)).rope
    assert (found.kind, found.theta, found.factor) == ("linear", 100000.0, 2.0)


def test_newer_configs_name_theta_inside_the_rope_parameters():
    rope = {"rope_type": "default", "rope_theta": 7.0}
    assert ModelShape.from_hf(config(rope_parameters=rope)).rope.theta == 7.0


def test_a_sliding_window_bounds_the_context():
    assert ModelShape.from_hf(config(sliding_window=4096)).max_positions == 4096
    unused = config(sliding_window=4096, use_sliding_window=False)
    assert ModelShape.from_hf(unused).max_positions == 8192


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "not supported. Supported: LlamaForCausalLM"),
        ({"architectures": None}, "missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "Quantized"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], complaint: str):
    with pytest.raises(CheckpointError, match=complaint):
        ModelShape.from_hf(config(**changes))


def test_end_tokens_of_the_generation_config_win(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelShape.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert ModelShape.from_folder(tmp_path).eos_token_ids == (5, 6)


def test_a_folder_without_a_config(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelShape.from_folder(tmp_path)


def test_a_config_that_lacks_a_size(tmp_path: Path):
    lacking = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(lacking))
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        ModelShape.from_folder(tmp_path)


def test_a_config_that_is_no_json(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelShape.from_folder(tmp_path)


# --- geometry ------------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    num_kv_heads = draw(st.integers(1, 40))
    q_per_kv = draw(st.integers(1, 12))
    shape = ModelShape(
        family="llama",
        num_layers=draw(st.integers(1, 80)),
        hidden_size=64,
        num_q_heads=num_kv_heads * q_per_kv,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([64, 96, 128])),
        intermediate_size=draw(st.integers(1, 30000)),
        vocab_size=draw(st.integers(1, 300000)),
        max_positions=4096,
    )
    max_bits = draw(st.integers(0, 6))
    return Geometry(shape, 1 << max_bits, 1 << draw(st.integers(0, max_bits)))


def degrees(geometry: Geometry) -> list[int]:
    return [1 << bit for bit in range(geometry.max_tp.bit_length())]


@given(geometries())
def test_everything_divides_at_every_degree(geometry: Geometry):
    for degree in degrees(geometry):
        assert (geometry.num_kv_heads * geometry.q_per_kv) % degree == 0
        assert geometry.intermediate_size % (64 * degree) == 0
        assert geometry.vocab_size % degree == 0
        narrow, wide = sorted((degree, geometry.num_kv_heads))
        assert wide % narrow == 0, "a rank has whole KV heads, or a KV head has whole ranks"


@given(geometries())
def test_padding_adds_and_is_never_more_than_needed(geometry: Geometry):
    shape, top = geometry.shape, geometry.max_tp
    assert 0 <= geometry.vocab_size - shape.vocab_size < top
    assert 0 <= geometry.intermediate_size - shape.intermediate_size < 64 * top
    assert geometry.num_kv_heads >= shape.num_kv_heads
    assert geometry.num_kv_heads < max(2 * shape.num_kv_heads, shape.num_kv_heads + top)
    assert geometry.q_per_kv >= shape.q_per_kv


@given(geometries())
def test_a_shape_that_divides_is_not_padded(geometry: Geometry):
    padded = Geometry(
        ModelShape(
            "llama",
            1,
            64,
            geometry.num_kv_heads * geometry.q_per_kv,
            geometry.num_kv_heads,
            64,
            geometry.intermediate_size,
            geometry.vocab_size,
            64,
        ),
        geometry.max_tp,
    )
    assert padded.num_kv_heads == geometry.num_kv_heads
    assert padded.q_per_kv == geometry.q_per_kv
    assert padded.intermediate_size == geometry.intermediate_size
    assert padded.vocab_size == geometry.vocab_size


@given(geometries())
def test_shards_tile_the_kv_heads(geometry: Geometry):
    """Below T > H every head is in one shard; above, in degree / H shards."""
    for degree in degrees(geometry):
        counts = [0] * geometry.num_kv_heads
        for shard in range(degree):
            for head in geometry.kv_heads(degree, shard):
                counts[head] += 1
        assert set(counts) == {max(1, degree // geometry.num_kv_heads)}


@given(geometries())
def test_a_shard_at_twice_the_degree_works_on_heads_of_the_shard_it_lies_in(geometry: Geometry):
    for degree in degrees(geometry)[:-1]:
        for shard in range(2 * degree):
            wide = geometry.kv_heads(2 * degree, shard)
            assert set(wide) <= set(geometry.kv_heads(degree, shard // 2))


@given(geometries())
def test_query_heads_of_all_ranks_are_all_query_heads(geometry: Geometry):
    total = geometry.num_kv_heads * geometry.q_per_kv
    assert {geometry.q_heads(degree) * degree for degree in degrees(geometry)} == {total}


@given(geometries())
def test_units_are_whole_heads_and_pages_are_whole_units(geometry: Geometry):
    assert geometry.heads_per_unit * geometry.num_units == geometry.num_kv_heads
    for degree in degrees(geometry):
        heads = geometry.units_per_page(degree) * geometry.heads_per_unit
        assert heads == len(geometry.kv_heads(degree, 0))


@given(geometries(), st.sampled_from([1, 16, 32]), st.sampled_from([2, 4]))
def test_a_block_takes_the_same_bytes_at_every_degree_up_to_h(
    geometry: Geometry, block_tokens: int, dtype_bytes: int
):
    shape = geometry.shape
    per_token = 2 * shape.num_layers * geometry.num_kv_heads * shape.head_dim * dtype_bytes
    unit_bytes = geometry.unit_bytes(block_tokens, dtype_bytes)
    for degree in degrees(geometry):
        if degree <= geometry.num_units:
            block = degree * geometry.units_per_page(degree) * unit_bytes
            assert block == per_token * block_tokens


@given(geometries())
def test_kv_rows_are_split_off_only_when_heads_are_replicated(geometry: Geometry):
    assert geometry.splits_kv == (geometry.max_tp > geometry.num_kv_heads)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 7), geometries())
def test_ranks_of_a_group_hold_all_heads_between_them(degree: int, index: int, geometry: Geometry):
    assume(degree <= geometry.max_tp)
    group = Group(degree, index)
    held = {h for rank in group.ranks for h in geometry.kv_heads(degree, group.shard_of(rank))}
    assert held == set(range(geometry.num_kv_heads))


def test_the_demo_model_on_four_ranks():
    """3 KV heads of 3 query heads each become 4 of 3 at T = 4."""
    geometry = Geometry(ModelShape.from_hf(LLAMA), 4)
    assert (geometry.num_kv_heads, geometry.q_per_kv, geometry.num_units) == (4, 3, 4)
    assert geometry.intermediate_size == 1536
    assert geometry.unit_bytes(16, 4) == 2 * 30 * 1 * 16 * 64 * 4
    assert [geometry.units_per_page(degree) for degree in (1, 2, 4)] == [4, 2, 1]


def test_more_ranks_than_kv_heads():
    """3 KV heads at T = 8 become 4, each held by two ranks; 3 query heads a group become 4."""
    geometry = Geometry(ModelShape.from_hf(LLAMA), 8)
    assert (geometry.num_kv_heads, geometry.q_per_kv, geometry.q_heads(8)) == (4, 4, 2)
    assert [tuple(geometry.kv_heads(8, shard)) for shard in range(4)] == [(0,), (0,), (1,), (1,)]
    assert geometry.splits_kv


@pytest.mark.parametrize(("max_tp", "min_tp"), [(3, 1), (4, 3), (0, 1), (2, 4)])
def test_degrees_that_make_no_sense(max_tp: int, min_tp: int):
    with pytest.raises(ConfigError):
        Geometry(ModelShape.from_hf(LLAMA), max_tp, min_tp)


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_rounding_up(value: int, multiple: int):
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple


@given(st.integers(1, 10**6))
def test_next_power_of_two(value: int):
    power = next_power_of_two(value)
    assert power & (power - 1) == 0
    assert power // 2 < value <= power
