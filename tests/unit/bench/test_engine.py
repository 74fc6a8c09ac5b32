"""Figures of the engine measurement from timings whose answer is known."""

from pathlib import Path

import pytest

from nitsum.bench import cuda_engine
from nitsum.bench.engine import Batch, Options, Timing, make_prompts, rate, spread
from nitsum.bench.floor import kv_bytes, weight_bytes
from nitsum.kv.cache import ArenaShape
from nitsum.shape import ModelShape

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=8,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=16,
    vocab_size=10,
    max_positions=64,
)


def batch() -> Batch:
    ours = [Timing(0.1, seconds, 40) for seconds in (1.0, 2.0, 4.0)]
    theirs = [Timing(0.2, seconds, 40) for seconds in (2.0, 2.0, 2.0)]
    return Batch(8, floor_ms=5.0, num_steps=5, ours=ours, theirs=theirs, worker_s=[0.2, 0.3, 0.9])


def test_rounds_are_compared_one_by_one():
    assert batch().vs_transformers == pytest.approx(2.2 / 2.1)
    assert rate(batch().ours) == pytest.approx(20.0)
    assert spread(batch().ours) == pytest.approx((40 - 10) / 20)


def test_figures_carry_their_batch_and_where_they_were_taken():
    figures = batch().figures()
    assert figures["vs_transformers_b8"] == pytest.approx(2.2 / 2.1)
    assert figures["vs_transformers_decode_b8"] == pytest.approx(1.0)
    assert figures["vs_transformers_ttft_b8"] == pytest.approx(2.0)
    assert figures["decode_ms_b8"] == pytest.approx(400.0)
    assert figures["decode_ms_b8_worker_only"] == pytest.approx(300.0)
    assert figures["transformers_ttft_ms_b8"] == pytest.approx(200.0)


def test_a_step_reads_no_embedding_table_but_an_output_matrix():
    layer = 8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16
    assert weight_bytes(SHAPE, "float32") == 4 * (2 * layer + 80)
    assert kv_bytes(SHAPE, 3, "float32") == 4 * 3 * 2 * 2 * 4


def test_prompts_are_new_in_each_round_and_the_same_in_each_run():
    options = Options(Path("unused"), num_prompt=12)
    first, again = (make_prompts(options, 500, 2, 0) for _ in range(2))
    assert first == again
    assert first != make_prompts(options, 500, 2, 1)
    assert [len(prompt) for prompt in first] == [12, 12]


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(1, 800), (2, 1600), (4, 3200)])
def test_room_for_kv_is_counted_in_tokens(num_ranks: int, num_tokens: int):
    """100 units a rank, four of them a block of 32 tokens on one rank, and fewer the more ranks."""
    arena = ArenaShape(num_ranks, num_units=100, units_per_block=4, block_tokens=32)
    assert cuda_engine.kv_tokens(arena) == num_tokens
