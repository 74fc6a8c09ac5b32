"""Paged causal attention of chunks: many query tokens a sequence, after any context.

The rows of a program's tile are (token, query head of the group), so that grouped heads share what
they read. Blocks of rows of all sequences are numbered through, and a fixed number of programs
takes them in turns; how many there are and whose is found on the device, so that one captured
graph serves any step, and a wide one with few blocks starts no programs for nothing.

    tile rows, g = 3:   t0h0 t0h1 t0h2 -- t1h0 t1h1 t1h2 -- ...    (-- is padding to a power of two)
"""

# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch

from nitsum.kernels.attention import Sequences
from nitsum.kernels.language import cdiv, jit, next_power_of_2, tl


class Tuning(NamedTuple):
    """How one chunk program is shaped, and how many of them are wanted for each SM."""

    block_m: int = 128
    block_n: int = 128
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 2


@jit
def _attend_range(
    q_tile, mixed, top, total, keys, values, table, head, first, last, positions, context, scale,
    NUM_KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over positions first..last; unmasked blocks are seen by every row."""
    d = tl.arange(0, BLOCK_D)
    whole: tl.constexpr = BLOCK_D == D
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_N)
        seen = (at < context) if MASKED else (at >= 0)
        page = tl.load(table + at // PAGE, mask=seen, other=0).to(tl.int64)
        row = ((page * NUM_KV + head) * PAGE + at % PAGE) * D
        k_at, v_at = keys + row[None, :] + d[:, None], values + row[:, None] + d[None, :]
        if whole and not MASKED:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=seen[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q_tile, k, input_precision="ieee")
        if MASKED:
            scores = tl.where(at[None, :] <= positions[:, None], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        if whole and not MASKED:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        top = new_top
    return mixed, top, total


@jit
def _attend_block(
    q, keys, values, out, page_table, query_starts, contexts, scale, table_stride, head, seq, block,
    NUM_KV: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows of one sequence."""
    TOKENS: tl.constexpr = BLOCK_M // G_PAD
    row = tl.load(query_starts + seq)
    count = tl.load(query_starts + seq + 1) - row
    context = tl.load(contexts + seq)
    start = context - count + block * TOKENS  # position of the tile's first token
    i = tl.arange(0, BLOCK_M)
    token, g = block * TOKENS + i // G_PAD, i % G_PAD
    alive = (token < count) & (g < G)
    d = tl.arange(0, BLOCK_D)
    at = (((row + token).to(tl.int64) * NUM_KV + head) * G + g)[:, None] * D + d[None, :]
    inside = alive[:, None] & (d < D)[None, :]
    q_tile = tl.load(q + at, mask=inside, other=0.0)
    positions = tl.where(alive, start + i // G_PAD, context - 1)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = page_table + seq.to(tl.int64) * table_stride
    middle = (start + 1) // BLOCK_N * BLOCK_N  # up to here, every row sees every position
    end = tl.minimum(start + TOKENS, context)
    mixed, top, total = _attend_range(
        q_tile, mixed, top, total, keys, values, table, head, 0, middle, positions, context, scale,
        NUM_KV, D, PAGE, BLOCK_N, BLOCK_D, STAGES, False,
    )  # fmt: skip
    mixed, top, total = _attend_range(
        q_tile, mixed, top, total, keys, values, table, head, middle, end, positions, context,
        scale, NUM_KV, D, PAGE, BLOCK_N, BLOCK_D, STAGES, True,
    )  # fmt: skip
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@jit
def _chunk(
    q, keys, values, out, page_table, query_starts, contexts, scale, table_stride, num_seqs,
    NUM_KV: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SEQS: tl.constexpr, STAGES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Programs take blocks in turns, the last ones first, which see most; every other turn the
    other way round, so that all have about as much to do."""
    TOKENS: tl.constexpr = BLOCK_M // G_PAD
    head, program, num_programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    s = tl.arange(0, SEQS)
    counts = tl.load(query_starts + s + 1, mask=s < num_seqs, other=0)
    counts -= tl.load(query_starts + s, mask=s < num_seqs, other=0)
    counts = tl.where(tl.load(contexts + s, mask=s < num_seqs, other=0) == 0, 0, counts)
    if MIXED:
        counts = tl.where(counts == 1, 0, counts)
    blocks = tl.cdiv(counts, TOKENS)
    ends = tl.cumsum(blocks, 0)
    num_blocks = tl.sum(blocks, 0)
    for turn in range(tl.cdiv(num_blocks, num_programs)):
        place = tl.where(turn % 2 == 0, program, num_programs - 1 - program)
        nth = num_blocks - 1 - turn * num_programs - place
        if nth >= 0:
            ended = (ends <= nth) & (s < num_seqs)
            seq = tl.sum(ended.to(tl.int32), 0)
            block = nth - tl.sum(tl.where(ended, blocks, 0), 0)
            _attend_block(
                q, keys, values, out, page_table, query_starts, contexts, scale, table_stride,
                head, seq, block, NUM_KV, G, G_PAD, D, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
            )  # fmt: skip


def chunk_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sequences: Sequences,
    out: torch.Tensor,
    *,
    num_sms: int,
    mixed: bool,
    tuning: Tuning,
) -> None:
    """Attend sequences of any number of tokens (`mixed`: skip those of exactly one).

    q, out [n, G, g, d]; keys, values [pages, G, block_tokens, d]. Rows of no sequence stay as
    they are in `out`.
    """
    n, num_kv, g, d = q.shape
    g_pad = next_power_of_2(g)
    block_m = max(tuning.block_m, g_pad)
    tokens, num_seqs = block_m // g_pad, sequences.num_seqs
    # Each sequence has at most one block that is not full.
    num_blocks = min(n, n // tokens + num_seqs)
    num_programs = min(num_blocks, cdiv(tuning.programs_per_sm * num_sms, num_kv))
    _chunk[(num_kv, num_programs)](
        q, keys, values, out, sequences.page_table, sequences.query_starts, sequences.contexts,
        d**-0.5 * 1.4426950408889634, sequences.page_table.stride(0), num_seqs,
        NUM_KV=num_kv, G=g, G_PAD=g_pad, D=d, PAGE=keys.shape[2],
        BLOCK_M=block_m, BLOCK_N=tuning.block_n, BLOCK_D=next_power_of_2(d),
        SEQS=next_power_of_2(num_seqs), STAGES=tuning.num_stages, MIXED=mixed,
        num_warps=tuning.num_warps,
    )  # fmt: skip
