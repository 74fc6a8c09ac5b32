"""Each kernel against its torch reference, for any shapes: asserted small here, large on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nitsum.kernels import activation, gather, norm, prepare, qkv_rope
from nitsum.kernels import decode_attention as decode
from nitsum.kernels.attention import AttentionBackend
from nitsum.kernels.triton_attention import TritonAttention
from nitsum.messages import Work
from nitsum.model import layers
from nitsum.model.attention import PagedAttention
from nitsum.model.cuda_ops import rope_table
from nitsum.model.ops import Heads
from nitsum.model.torch_ops import TorchOps
from nitsum.shape import ModelShape, RopeScaling
from tests.lanes import MemoryPages, Part, compose
from tests.unit.kernels.kit import (
    DEVICE,
    Step,
    close,
    exact,
    filled_slots,
    layer_weights,
    make_step,
    packed,
    randn,
)

ROPE = RopeScaling("llama3", 500000.0, 8.0, 1.0, 4.0, 64)


def check_norms(n: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x, residual = randn(n, size, seed=seed, dtype=dtype), randn(n, size, seed=seed + 1, dtype=dtype)
    weight = randn(size, seed=seed + 2, dtype=dtype)
    compare = exact if dtype == torch.float32 else close
    compare(norm.rms_norm(x, weight, 1e-5), layers.rms_norm(x, weight, 1e-5))
    expected_residual = residual + x
    ours = norm.add_rms_norm(x, residual, weight, 1e-5)
    compare(residual, expected_residual)
    compare(ours, layers.rms_norm(expected_residual, weight, 1e-5))


def check_silu_mul(n: int, chunks: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = randn(n, chunks * 2 * width, seed=seed, dtype=dtype)
    compare = exact if dtype == torch.float32 else close
    compare(activation.silu_mul(gate_up, chunks), layers.silu_mul(gate_up, chunks))


def check_qkv_rope(
    heads: tuple[int, int, int],
    num_tokens: int,
    dtype: torch.dtype,
    seed: int,
    *,
    splits: bool,
    biased: bool,
    normed: bool,
    block_tokens: int = 4,
) -> None:
    num_kv, g, d = heads
    start, half = 3, num_tokens // 2
    num_pages = num_tokens // block_tokens + 4
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    middle = -(-(start + half) // block_tokens)
    parts = [Part([0] * half, start, order[:middle]),
             Part([0] * (num_tokens - half), 0, order[middle:])]  # fmt: skip
    step = compose([part for part in parts if part.tokens], block_tokens)
    shape = ModelShape("llama", 1, 8, num_kv * g, num_kv, d, 8, 16, 4096, rope=ROPE)
    sizes = [num_kv * g * d, num_kv * 2 * d] if splits else [num_kv * (g + 2) * d]
    rows = [randn(num_tokens, size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]
    bias = [randn(size, seed=seed + 5 + i, dtype=dtype) for i, size in enumerate(sizes)]
    layer = layer_weights(
        qkv_bias=bias[0] if biased else None,
        kv_bias=bias[1] if biased and splits else None,
        q_norm=randn(d, seed=seed + 8, dtype=dtype) if normed else None,
        k_norm=randn(d, seed=seed + 9, dtype=dtype) if normed else None,
    )
    on_cpu = layer_weights(**{name: None if value is None else value.cpu()
                              for name, value in vars(layer).items()})  # fmt: skip
    reference = MemoryPages(torch.full((2, 1, num_pages, num_kv, block_tokens, d), 9.0).to(dtype))
    ours = MemoryPages(reference.cache.clone().to(DEVICE))
    expected = TorchOps(shape, Heads(num_kv, g, d), dtype, reference, step).split_rope_write(
        0, on_cpu, rows[0].cpu().clone(), rows[1].cpu().clone() if splits else None
    )
    kv_slots = step.kv_slots.clone()
    kv_slots[-1] = -1  # padding: q is computed, nothing is written
    table = rope_table(ROPE, d, num_tokens + start, dtype, DEVICE)
    q = qkv_rope.qkv_rope_write(
        *qkv_rope.split_heads(rows[0], rows[1] if splits else None, *heads),
        table, step.positions.to(DEVICE), kv_slots.to(DEVICE), ours.keys(0), ours.values(0),
        qkv_rope.split_heads(bias[0], bias[1] if splits else None, *heads) if biased else None,
        (layer.q_norm, layer.k_norm) if normed else None,
        shape.rms_eps,
    )  # fmt: skip
    last = int(step.kv_slots[-1])
    reference.cache[:, 0, last // block_tokens, :, last % block_tokens] = 9.0
    compare = exact if dtype == torch.float32 else close
    compare(q, expected)
    compare(ours.cache, reference.cache)


def check_prepare(
    parts: Sequence[tuple[int, int, bool]], num_padding: int, block_tokens: int, seed: int,
    *, decode: bool, num_slots: int = 40, row_tokens: int = 64,
) -> None:  # fmt: skip
    """`parts` are (start, num_tokens, samples)."""
    slots, rows, tables = filled_slots(num_slots, row_tokens, block_tokens, seed)
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed)).tolist()
    work = [Work(order[i], *part) for i, part in enumerate(parts)]
    expected = slots.step_input(work)
    bucket, n = len(work) + num_padding, len(expected.tokens)
    size = n + num_padding  # the last ones are padding
    out = prepare.StepTensors.empty(size + 9, bucket + 2, tables.shape[1], DEVICE)
    out = out.narrow(size, bucket)
    prepare.prepare(rows, tables, packed(work, bucket), block_tokens, out, decode=decode)

    def same(ours: torch.Tensor, values: torch.Tensor | Sequence[int], padding: int) -> None:
        values = values if isinstance(values, torch.Tensor) else torch.tensor(values)
        assert ours[: len(values)].tolist() == values.tolist()
        assert ours[len(values) :].tolist() == [padding] * (len(ours) - len(values))

    same(out.tokens, expected.tokens, 0)
    same(out.positions, expected.positions, 0)
    same(out.kv_slots, expected.kv_slots, -1)
    same(out.contexts, [span.context for span in expected.spans], 0)
    same(out.sample_rows, expected.sample_rows, 0)
    sampling = [part for part in work if part.samples]
    same(out.sample_slots, [part.slot for part in sampling], -1)
    same(out.sample_positions, [part.start + part.num_tokens for part in sampling], 0)
    starts = [span.first for span in expected.spans]
    tail = [n + i for i in range(num_padding + 1)] if decode else [n] * (num_padding + 1)
    assert out.query_starts.tolist() == starts + tail
    for line, span in enumerate(expected.spans):
        count = -(-span.context // block_tokens)
        assert out.page_table[line, :count].tolist() == expected.page_table[line, :count].tolist()


def check_attention(backend: AttentionBackend, step: Step) -> None:
    """Against the CPU's attention in float32; rows of padding may hold anything."""
    out = torch.full_like(step.q, 77.0)
    backend.plan(step.sequences, step.lengths)
    backend.run(step.q, step.keys, step.values, out)
    reference_step, q, keys, values = step.reference_inputs()
    n = len(reference_step.tokens)
    attention = PagedAttention(reference_step, keys.shape[1], keys.shape[2], torch.float32)
    expected = attention(q[:n], keys, values)
    compare = exact if step.q.dtype == torch.float32 else close
    compare(out[:n].flatten(1), expected)


def triton_backend(
    step: Step, *, decode_only: bool, tuning: decode.Tuning | None = None
) -> TritonAttention:
    _, num_kv, g, d = step.q.shape
    return TritonAttention(
        step.sequences.num_seqs, num_kv, g, d, DEVICE,
        decode_only=decode_only, decode_tuning=tuning,
    )  # fmt: skip


def check_triton_attention(
    parts: Sequence[tuple[int, int]], heads: tuple[int, int, int], block_tokens: int,
    dtype: torch.dtype, seed: int, num_padding: int,
) -> None:  # fmt: skip
    step = make_step(parts, heads, block_tokens, dtype, seed, num_padding)
    decode_only = all(n == 1 for _, n in parts)
    check_attention(triton_backend(step, decode_only=decode_only), step)


def check_gather(
    num_ranks: int, num_layers: int, row_elements: int, num_moves: int, layers: range,
    num_programs: int, seed: int, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Ranks are arenas of different sizes on one device."""
    sizes = [num_moves + 3 * rank + 1 for rank in range(num_ranks)]
    arenas = [randn(2 * num_layers, size, row_elements, seed=seed + i, dtype=dtype)
              for i, size in enumerate(sizes)]  # fmt: skip
    dst = randn(2 * num_layers, num_moves + 5, row_elements, seed=seed + 50, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, num_ranks, (num_moves,), generator=generator).tolist()
    places = torch.randperm(num_moves + 5, generator=generator).tolist()
    moves = [[rank, i % sizes[rank], places[i]] for i, rank in enumerate(ranks)]
    expected = dst.clone()
    planes = [*layers, *(num_layers + layer for layer in layers)]
    for rank, unit, place in moves:
        expected[planes, place] = arenas[rank][planes, unit]
    moves += [[0, 0, 0]] * 3  # beyond `count`
    gather.gather_units(
        torch.tensor([arena.data_ptr() for arena in arenas], device=DEVICE),
        torch.tensor(sizes, device=DEVICE),
        torch.tensor(moves, dtype=torch.int32, device=DEVICE),
        torch.tensor([num_moves], dtype=torch.int32, device=DEVICE),
        dst,
        layers=layers,
        num_programs=num_programs,
    )
    assert torch.equal(dst, expected)
