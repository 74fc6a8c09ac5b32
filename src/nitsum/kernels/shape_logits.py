"""Penalties, biases and masked stop tokens, on float32 logits in place.

How often a token occurred is counted from the slot's row each time, so that a sequence that moves
brings nothing but its row. Counting goes through one integer a vocabulary entry, all zero between
calls: tokens are added up first; then each position takes its token's count and leaves zero behind,
so that of several equal tokens exactly one applies the penalty, and nothing has to be cleared.

    count:  prompt token: 1 << 24        answer token: 1 (so a row may be up to 128 x 2^24 long
            in the prompt and 2^24 in the answer)
"""

import torch

from nitsum.kernels.language import cdiv, jit, tl
from nitsum.kernels.sampling_table import (
    BIASES_AT,
    LINE_INTS,
    MAX_BIASES,
    MAX_STOPS,
    STOPS_AT,
    VALUES_AT,
)

_LINE: tl.constexpr = tl.constexpr(LINE_INTS)
_STOPS_AT: tl.constexpr = tl.constexpr(STOPS_AT)
_MAX_STOPS: tl.constexpr = tl.constexpr(MAX_STOPS)
_BIASES_AT: tl.constexpr = tl.constexpr(BIASES_AT)
_VALUES_AT: tl.constexpr = tl.constexpr(VALUES_AT)
_MAX_BIASES: tl.constexpr = tl.constexpr(MAX_BIASES)
_IN_PROMPT: tl.constexpr = tl.constexpr(1 << 24)

POSITIONS_PER_PROGRAM = 1024


@jit
def load_float(line, at: tl.constexpr):
    """Entry `at` of a table's line, as the float32 whose bits it holds."""
    return tl.load(line + at).to(tl.float32, bitcast=True)


@jit
def _has_penalty(line):
    neutral = (load_float(line, 3) == 0.0) & (load_float(line, 4) == 0.0)
    return ~(neutral & (load_float(line, 5) == 1.0))


@jit
def _row_tokens(rows, slot, row_tokens, position, vocab, BLOCK: tl.constexpr):
    """(token ids, their positions, which count) of this program's part of a row."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(rows + slot * row_tokens + at, mask=at < position, other=-1)
    return token, at, (token >= 0) & (token < vocab)


@jit
def _count(
    rows, table, slots, positions, counts, row_tokens, vocab, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i).to(tl.int64)
    position = tl.load(positions + i)
    if (slot < 0) | (tl.program_id(1) * BLOCK >= position):
        return
    line = table + slot * _LINE
    if _has_penalty(line):
        token, at, live = _row_tokens(rows, slot, row_tokens, position, vocab, BLOCK)
        one = tl.where(at < tl.load(line + 7), _IN_PROMPT, 1)
        tl.atomic_add(counts + i * vocab + token, one, mask=live, sem="relaxed")


@jit
def _penalize(
    logits, rows, table, slots, positions, counts, row_stride, row_tokens, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i).to(tl.int64)
    position = tl.load(positions + i)
    if (slot < 0) | (tl.program_id(1) * BLOCK >= position):
        return
    line = table + slot * _LINE
    if _has_penalty(line):
        token, _, live = _row_tokens(rows, slot, row_tokens, position, vocab, BLOCK)
        zero = tl.zeros([BLOCK], tl.int32)
        count = tl.atomic_xchg(counts + i * vocab + token, zero, mask=live, sem="relaxed")
        first = live & (count > 0)
        in_answer = (count % _IN_PROMPT).to(tl.float32)
        x = tl.load(logits + i * row_stride + token, mask=first, other=0.0)
        repetition = load_float(line, 5)
        x = tl.where(x > 0, x / repetition, x * repetition)
        once = tl.where(in_answer > 0, load_float(line, 3), 0.0)
        x -= load_float(line, 4) * in_answer + once
        tl.store(logits + i * row_stride + token, x, mask=first)


@jit
def _bias_and_mask(logits, table, slots, positions, row_stride, vocab):
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i).to(tl.int64)
    if slot < 0:
        return
    line = table + slot * _LINE
    row = logits + i * row_stride
    b = tl.arange(0, _MAX_BIASES)
    token = tl.load(line + _BIASES_AT + b, mask=b < tl.load(line + 11), other=-1)
    live = (token >= 0) & (token < vocab)
    bias = tl.load(line + _VALUES_AT + b, mask=live, other=0).to(tl.float32, bitcast=True)
    x = tl.load(row + token, mask=live, other=0.0)
    tl.store(row + token, x + bias, mask=live)
    tl.debug_barrier()  # a biased token may be a stop token, stored by another thread
    if tl.load(positions + i) - tl.load(line + 7) < tl.load(line + 8):
        s = tl.arange(0, _MAX_STOPS)
        stop = tl.load(line + _STOPS_AT + s, mask=s < tl.load(line + 10), other=-1)
        hidden = tl.full([_MAX_STOPS], -float("inf"), tl.float32)
        tl.store(row + stop, hidden, mask=(stop >= 0) & (stop < vocab))


def shape_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    max_position: int,
) -> None:
    """Apply each draw's penalties, biases and stop mask to float32 `logits` [m, V], in place.

    rows [slots, row_tokens] int32; table from `sampling_table`; slots (-1: padding) and positions
    [m] int32; counts [m, V] int32 zeros, zero again afterwards; `max_position` bounds positions.
    """
    m, vocab = logits.shape
    assert logits.dtype == torch.float32
    assert counts.shape[0] >= m
    assert counts.stride(0) == vocab
    if not m:
        return
    grid = (m, cdiv(max(1, max_position), POSITIONS_PER_PROGRAM))
    who = (rows, table, slots, positions, counts)
    _count[grid](*who, rows.shape[1], vocab, BLOCK=POSITIONS_PER_PROGRAM)
    _penalize[grid](
        logits, *who, logits.stride(0), rows.shape[1], vocab, BLOCK=POSITIONS_PER_PROGRAM
    )
    _bias_and_mask[(m,)](logits, table, slots, positions, logits.stride(0), vocab)
