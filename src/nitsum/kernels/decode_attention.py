"""Paged attention of one query token a sequence, its context split over several programs.

A program attends the g query heads of one KV head (they are the rows of its matrix products) to
one part of one sequence. Sequences of a single part write their result at once; the others leave
partial results, which a second kernel merges:

    grid (sequence, KV head, part) -> partial [s, G, parts, g, d] and log-sums -> grid (s, G) -> out

How long a part is follows the step and is decided on the device, so that one captured graph
serves any lengths: short enough to fill the GPU, long enough to be worth a program.
"""

# A condition known to the compiler stays apart from one that is not.
# ruff: noqa: SIM102

from typing import NamedTuple

import torch

from nitsum.kernels.attention import Sequences
from nitsum.kernels.language import jit, next_power_of_2, tl

MIN_PART_TOKENS = 128
PROGRAMS_PER_SM = 4


class Tuning(NamedTuple):
    """How one decode program is shaped."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = PROGRAMS_PER_SM


class DecodeBuffers(NamedTuple):
    """Scratch of one bucket: shared by all layers, made once."""

    part_tokens: torch.Tensor  # [1] int32
    partial: torch.Tensor  # [s, G, parts, g, d] float32
    log_sums: torch.Tensor  # [s, G, parts, g] float32, base 2

    @property
    def max_parts(self) -> int:
        return self.partial.shape[2]


def decode_buffers(
    num_seqs: int, num_kv: int, q_per_kv: int, head_dim: int, device: torch.device | str,
    num_sms: int = 132,
) -> DecodeBuffers:  # fmt: skip
    """Few sequences may have many parts each, many sequences a few (their lengths differ)."""
    wanted = 2 * PROGRAMS_PER_SM * num_sms // (num_seqs * num_kv)
    parts = min(64, max(4, next_power_of_2(max(1, wanted))))
    partial = torch.empty(num_seqs, num_kv, parts, q_per_kv, head_dim, device=device)
    part_tokens = torch.full((1,), MIN_PART_TOKENS, dtype=torch.int32, device=device)
    return DecodeBuffers(part_tokens, partial, torch.empty_like(partial[..., 0]))


@jit
def _plan_parts(
    contexts, part_tokens, num_seqs, num_kv, target, max_parts,
    MIN_PART: tl.constexpr, SEQS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, SEQS)
    lengths = tl.load(contexts + i, mask=i < num_seqs, other=0)
    fair = tl.cdiv(tl.sum(lengths, 0) * num_kv, target)
    room = tl.cdiv(tl.max(lengths, 0), max_parts)
    wanted = tl.maximum(fair, room)
    tl.store(part_tokens, tl.maximum(tl.cdiv(wanted, MIN_PART), 1) * MIN_PART)


@jit
def _attend_part(
    q_tile, keys, values, table, head, first, last, scale,
    NUM_KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax of `q_tile` over positions first..last: (values, maxima, sums)."""
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_N)
        seen = at < last
        page = tl.load(table + at // PAGE, mask=seen, other=0).to(tl.int64)
        row = ((page * NUM_KV + head) * PAGE + at % PAGE) * D
        k = tl.load(
            keys + row[None, :] + d[:, None], mask=seen[None, :] & (d < D)[:, None], other=0.0
        )
        scores = tl.dot(q_tile, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        v = tl.load(
            values + row[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0
        )
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        top = new_top
    return mixed, top, total


@jit
def _decode(
    q, keys, values, out, partial, log_sums, page_table, query_starts, contexts, part_tokens,
    scale, table_stride, max_parts,
    NUM_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    seq, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + seq)
    length = tl.load(part_tokens)
    first = part * length
    if first >= context:
        return
    row = tl.load(query_starts + seq)
    if MIXED:
        if tl.load(query_starts + seq + 1) - row != 1:
            return
    g, d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (g < G) & (d < D)
    at = (row.to(tl.int64) * NUM_KV + head) * G * D + g * D + d
    q_tile = tl.load(q + at, mask=inside, other=0.0)
    mixed, top, total = _attend_part(
        q_tile, keys, values, page_table + seq.to(tl.int64) * table_stride, head,
        first, tl.minimum(first + length, context), scale,
        NUM_KV, D, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    result = mixed / total[:, None]
    if context <= length:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        place = (seq.to(tl.int64) * NUM_KV + head) * max_parts + part
        tl.store(partial + place * G * D + g * D + d, result, mask=inside)
        rows = tl.arange(0, BLOCK_M)
        tl.store(log_sums + place * G + rows, top + tl.log2(total), mask=rows < G)


@jit
def _merge(
    partial, log_sums, out, query_starts, contexts, part_tokens,
    NUM_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MAX_PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    seq, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + seq)
    length = tl.load(part_tokens)
    if context <= length:
        return
    row = tl.load(query_starts + seq)
    if MIXED:
        if tl.load(query_starts + seq + 1) - row != 1:
            return
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (g < G)[:, None] & (d < D)[None, :]
    tile = g[:, None] * D + d[None, :]
    place = (seq.to(tl.int64) * NUM_KV + head) * MAX_PARTS
    parts = tl.arange(0, MAX_PARTS)
    logs = tl.load(
        log_sums + (place + parts)[None, :] * G + g[:, None],
        mask=(parts * length < context)[None, :] & (g < G)[:, None], other=-float("inf"),
    )  # fmt: skip
    top = tl.where(g < G, tl.max(logs, 1), 0.0)
    total = tl.sum(tl.exp2(logs - top[:, None]), 1)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for part in range(tl.cdiv(context, length)):
        log = tl.load(log_sums + (place + part) * G + g, mask=g < G, other=-float("inf"))
        values = tl.load(partial + (place + part) * G * D + tile, mask=inside, other=0.0)
        mixed += values * tl.exp2(log - top)[:, None]
    result = mixed / tl.where(g < G, total, 1.0)[:, None]
    at = (row.to(tl.int64) * NUM_KV + head) * G * D + tile
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def plan_parts(
    sequences: Sequences, buffers: DecodeBuffers, num_kv: int, num_sms: int, tuning: Tuning
) -> None:
    """Decide how long a part is in this step; one small kernel, once a step."""
    _plan_parts[(1,)](
        sequences.contexts, buffers.part_tokens, sequences.num_seqs, num_kv,
        tuning.programs_per_sm * num_sms, buffers.max_parts,
        MIN_PART=MIN_PART_TOKENS, SEQS=next_power_of_2(sequences.num_seqs),
    )  # fmt: skip


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sequences: Sequences,
    buffers: DecodeBuffers,
    out: torch.Tensor,
    *,
    mixed: bool,
    tuning: Tuning,
) -> None:
    """Attend sequences of one token (`mixed`: and skip those of more); `plan_parts` came before.

    q, out [n, G, g, d]; keys, values [pages, G, block_tokens, d].
    """
    _, num_kv, g, d = q.shape
    block_d, num_seqs = next_power_of_2(d), sequences.num_seqs
    _decode[(num_seqs, num_kv, buffers.max_parts)](
        q, keys, values, out, buffers.partial, buffers.log_sums,
        sequences.page_table, sequences.query_starts, sequences.contexts, buffers.part_tokens,
        d**-0.5 * 1.4426950408889634, sequences.page_table.stride(0), buffers.max_parts,
        NUM_KV=num_kv, G=g, D=d, PAGE=keys.shape[2],
        BLOCK_M=max(16, next_power_of_2(g)), BLOCK_N=tuning.block_n, BLOCK_D=block_d,
        STAGES=tuning.num_stages, MIXED=mixed, num_warps=tuning.num_warps,
    )  # fmt: skip
    _merge[(num_seqs, num_kv)](
        buffers.partial, buffers.log_sums, out,
        sequences.query_starts, sequences.contexts, buffers.part_tokens,
        NUM_KV=num_kv, G=g, D=d, MAX_PARTS=buffers.max_parts,
        BLOCK_G=next_power_of_2(g), BLOCK_D=block_d, MIXED=mixed, num_warps=4,
    )  # fmt: skip
