"""Paged attention of one query token a sequence, its context split over several programs.

A program attends the g query heads of one KV head (they are the rows of its matrix products) to
one part of one sequence. Sequences of a single part write their result at once; the others leave
partial results, which a second kernel merges:

    plan:   lengths -> part length, list of (sequence, part)             once a step
    grid (part of the list, KV head) -> partial [parts, G, g, d] and log-sums -> grid (s, G) -> out

How long a part is follows the step and is decided on the device, so that one captured graph
serves any lengths: the whole batch cut into as many equal parts as fill the GPU, so that one long
sequence among short ones is cut more often, and the list is never longer than a fixed bound.
"""

# A condition known to the compiler stays apart from one that is not.
# ruff: noqa: SIM102

from typing import NamedTuple

import torch

from nitsum.kernels.attention import Sequences
from nitsum.kernels.language import cdiv, jit, next_power_of_2, tl

MIN_PART_TOKENS = 128
ITEMS_PER_PROGRAM = 32
MERGED_AT_ONCE = 16


class Tuning(NamedTuple):
    """How one decode program is shaped, and how many of them are wanted for each SM."""

    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 3


class DecodeBuffers(NamedTuple):
    """Scratch of one bucket: shared by all layers, made once."""

    part_tokens: torch.Tensor  # [1] int32: how long a part is
    items: torch.Tensor  # [bound, 8] int32: sequence or -1, row, first, last, is whole; unused
    first_items: torch.Tensor  # [s] int32: where a sequence's parts begin
    partial: torch.Tensor  # [bound, G, g, d] float32
    log_sums: torch.Tensor  # [bound, G, g] float32, base 2


def decode_buffers(
    num_seqs: int, num_kv: int, q_per_kv: int, head_dim: int, device: torch.device | str,
    num_programs: int,
) -> DecodeBuffers:  # fmt: skip
    """For about `num_programs` programs a layer: each sequence adds one part that is not full."""
    bound = num_seqs + cdiv(num_programs, num_kv)

    def ints(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    partial = torch.empty(bound, num_kv, q_per_kv, head_dim, device=device)
    log_sums = torch.empty(bound, num_kv, q_per_kv, device=device)
    return DecodeBuffers(ints(1), ints(bound, 8), ints(num_seqs), partial, log_sums)


@jit
def _plan_parts(
    query_starts, contexts, part_tokens, items, first_items, num_seqs, num_kv, num_programs, bound,
    MIXED: tl.constexpr, MIN_PART: tl.constexpr, SEQS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Each program lists a few items; the first one also says how long parts are."""
    s = tl.arange(0, SEQS)
    lengths = tl.load(contexts + s, mask=s < num_seqs, other=0)
    if MIXED:
        end = tl.load(query_starts + s + 1, mask=s < num_seqs, other=0)
        start = tl.load(query_starts + s, mask=s < num_seqs, other=0)
        lengths = tl.where(end - start == 1, lengths, 0)
    fair = tl.cdiv(tl.sum(lengths, 0) * num_kv, num_programs)
    part = tl.maximum(tl.cdiv(fair, MIN_PART), 1) * MIN_PART
    counts = tl.cdiv(lengths, part)
    ends = tl.cumsum(counts, 0)
    i = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    ended = (ends[None, :] <= i[:, None]) & (s < num_seqs)[None, :]
    seq = tl.sum(ended.to(tl.int32), 1)
    before = tl.sum(tl.where(ended, counts[None, :], 0), 1)
    listed = (seq < num_seqs) & (i < bound)
    length = tl.load(contexts + seq, mask=listed, other=0)
    first = (i - before) * part
    tl.store(items + i * 8, tl.where(listed, seq, -1), mask=i < bound)
    tl.store(items + i * 8 + 1, tl.load(query_starts + seq, mask=listed, other=0), mask=listed)
    tl.store(items + i * 8 + 2, first, mask=listed)
    tl.store(items + i * 8 + 3, tl.minimum(first + part, length), mask=listed)
    tl.store(items + i * 8 + 4, (length <= part).to(tl.int32), mask=listed)
    if tl.program_id(0) == 0:
        tl.store(part_tokens, part)
        tl.store(first_items + s, ends - counts, mask=s < num_seqs)


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
        scores = tl.dot(q_tile, k, input_precision="ieee")
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
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
    q, keys, values, out, partial, log_sums, page_table, items, scale, table_stride,
    NUM_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(1), tl.program_id(0)
    seq = tl.load(items + item * 8)
    row = tl.load(items + item * 8 + 1).to(tl.int64)
    first = tl.load(items + item * 8 + 2)
    last = tl.load(items + item * 8 + 3)
    is_whole = tl.load(items + item * 8 + 4)
    if seq < 0:
        return
    g, d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (g < G) & (d < D)
    at = (row * NUM_KV + head) * G * D + g * D + d
    q_tile = tl.load(q + at, mask=inside, other=0.0)
    mixed, top, total = _attend_part(
        q_tile, keys, values, page_table + seq.to(tl.int64) * table_stride, head, first, last,
        scale, NUM_KV, D, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    result = mixed / total[:, None]
    if is_whole != 0:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        place = item.to(tl.int64) * NUM_KV + head
        tl.store(partial + place * G * D + g * D + d, result, mask=inside)
        rows = tl.arange(0, BLOCK_M)
        tl.store(log_sums + place * G + rows, top + tl.log2(total), mask=rows < G)


@jit
def _merge(
    partial, log_sums, out, query_starts, contexts, part_tokens, first_items,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence, several parts at a time."""
    seq, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + seq)
    length = tl.load(part_tokens)
    first = tl.load(first_items + seq)
    row = tl.load(query_starts + seq)
    if context <= length:
        return
    if MIXED:
        if tl.load(query_starts + seq + 1) - row != 1:
            return
    d = tl.arange(0, BLOCK_D)
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros([BLOCK_D], tl.float32)
    count = tl.cdiv(context, length)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        place = (first + part).to(tl.int64) * HEADS + head
        logs = tl.load(log_sums + place, mask=part < count, other=-float("inf"))
        inside = (part < count)[:, None] & (d < D)[None, :]
        values = tl.load(partial + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(logs, 0))
        weights = tl.exp2(logs - new_top)
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 0)
        mixed = mixed * fade + tl.sum(values * weights[:, None], 0)
        top = new_top
    at = (row.to(tl.int64) * HEADS + head) * D + d
    tl.store(out + at, (mixed / total).to(out.dtype.element_ty), mask=d < D)


def plan_parts(
    sequences: Sequences, buffers: DecodeBuffers, num_kv: int, num_programs: int, *, mixed: bool
) -> None:
    """Decide how long a part is in this step, and list the parts; one small kernel, once a step."""
    bound = buffers.items.shape[0]
    _plan_parts[(cdiv(bound, ITEMS_PER_PROGRAM),)](
        sequences.query_starts, sequences.contexts, buffers.part_tokens, buffers.items,
        buffers.first_items, sequences.num_seqs, num_kv, num_programs, bound,
        MIXED=mixed, MIN_PART=MIN_PART_TOKENS, SEQS=next_power_of_2(sequences.num_seqs),
        ITEMS=ITEMS_PER_PROGRAM,
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
    block_d = next_power_of_2(d)
    _decode[(num_kv, buffers.items.shape[0])](
        q, keys, values, out, buffers.partial, buffers.log_sums, sequences.page_table,
        buffers.items, d**-0.5 * 1.4426950408889634, sequences.page_table.stride(0),
        NUM_KV=num_kv, G=g, D=d, PAGE=keys.shape[2],
        BLOCK_M=max(16, next_power_of_2(g)), BLOCK_N=tuning.block_n, BLOCK_D=block_d,
        STAGES=tuning.num_stages, num_warps=tuning.num_warps,
    )  # fmt: skip
    _merge[(sequences.num_seqs, num_kv * g)](
        buffers.partial, buffers.log_sums, out, sequences.query_starts, sequences.contexts,
        buffers.part_tokens, buffers.first_items,
        HEADS=num_kv * g, D=d, BLOCK_D=block_d, PARTS=MERGED_AT_ONCE, MIXED=mixed, num_warps=2,
    )  # fmt: skip
