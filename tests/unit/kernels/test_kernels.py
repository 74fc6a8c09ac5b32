"""Kernels of a layer and of a step against their references, on small shapes of all kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.kernels import prepare
from nitsum.kernels.flashinfer_attention import flatten_pages
from tests.unit.kernels import checks
from tests.unit.kernels.kit import DEVICE, make_step

torch.set_num_threads(1)
few = settings(max_examples=6)
seeds = st.integers(0, 1000)
BF16 = torch.bfloat16
F32 = torch.float32


@pytest.mark.parametrize(("n", "size", "dtype"), [(3, 48, F32), (2, 64, BF16), (0, 16, F32)])
def test_norms(n: int, size: int, dtype: torch.dtype) -> None:
    if n:
        checks.check_norms(n, size, dtype, seed=n)


@pytest.mark.parametrize(("chunks", "width", "dtype"), [(1, 64, F32), (2, 600, F32), (4, 64, BF16)])
def test_silu_mul(chunks: int, width: int, dtype: torch.dtype) -> None:
    checks.check_silu_mul(3, chunks, width, dtype, seed=width)


@few
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 12]), st.integers(1, 9),
       st.booleans(), st.booleans(), st.booleans(), seeds)  # fmt: skip
def test_qkv_rope_write(
    num_kv: int, g: int, d: int, n: int, splits: bool, biased: bool, normed: bool, seed: int
) -> None:
    checks.check_qkv_rope((num_kv, g, d), n, F32, seed, splits=splits, biased=biased, normed=normed)


def test_qkv_rope_write_of_many_tokens_and_bfloat16() -> None:
    checks.check_qkv_rope((1, 2, 8), 260, BF16, 1, splits=False, biased=True, normed=True)


decodes = st.lists(st.tuples(st.integers(0, 60), st.just(1), st.booleans()), max_size=6, min_size=1)
mixes = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 23), st.booleans()), max_size=6, min_size=1
)


@few
@given(decodes, st.integers(0, 4), seeds)
def test_prepare_of_decode_steps(parts: list, num_padding: int, seed: int) -> None:
    checks.check_prepare(parts, num_padding, 4, seed, decode=True)


@few
@given(mixes, st.integers(0, 4), seeds)
def test_prepare_of_any_steps(parts: list, num_padding: int, seed: int) -> None:
    checks.check_prepare(parts, num_padding, 4, seed, decode=False)


def test_record_keeps_known_tokens_and_hands_them_out() -> None:
    rows = torch.arange(30, dtype=torch.int32).view(3, 10).clone().to(DEVICE)
    before = rows.clone()
    known = torch.tensor([0, 5, 0], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([1, -1, 2, 1], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([4, 0, 9, 5], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([100, 101, 102, 103], dtype=torch.int32, device=DEVICE)
    prepare.record(rows, known, slots, positions, tokens)
    assert tokens.tolist() == [14, 101, 102, 103]  # position 4 of slot 1 was known
    before[2, 9], before[1, 5] = 102, 103
    assert torch.equal(rows, before)


contexts = st.integers(0, 700)
kinds = st.sampled_from([(1, 1, 16), (2, 3, 16), (1, 7, 8), (2, 4, 24)])


@few
@given(st.lists(st.tuples(contexts, st.just(1)), min_size=1, max_size=3), kinds,
       st.integers(0, 2), seeds)  # fmt: skip
def test_triton_decode_attention(parts: list, heads: tuple, num_padding: int, seed: int) -> None:
    checks.check_triton_attention(parts, heads, 16, F32, seed, num_padding)


@few
@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from([1, 1, 2, 40, 150])),
                min_size=1, max_size=4), kinds, st.integers(0, 2), seeds)  # fmt: skip
def test_triton_attention_of_mixed_steps(
    parts: list, heads: tuple, num_padding: int, seed: int
) -> None:
    checks.check_triton_attention(parts, heads, 16, F32, seed, num_padding)


def test_a_long_context_is_cut_into_parts() -> None:
    """The plan's part length makes several parts of one sequence and one of the other."""
    step = make_step([(900, 1), (3, 1)], (1, 2, 16), 16)
    backend = checks.triton_backend(step, decode_only=True)
    checks.check_attention(backend, step)
    length = int(backend._buffers.part_tokens)
    assert 4 < length < 900


@pytest.mark.parametrize("layers", [range(3), range(1, 2), range(1, 3)])
def test_gather(layers: range) -> None:
    checks.check_gather(2, 3, 24, 5, layers, num_programs=4, seed=3)


def test_flatten_pages() -> None:
    table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(3, 4)
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
    indices = torch.full((7,), -1, dtype=torch.int32, device=DEVICE)
    flatten_pages(table, starts, indices)
    assert indices.tolist() == [0, 1, 8, 9, 10, -1, -1]
