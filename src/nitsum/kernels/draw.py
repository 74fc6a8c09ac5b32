"""Drawing tokens: greedy, or temperature, min_p, top_k, top_p and the inverse cumulative sum.

No sorting. A token's weight is w = exp((logit - top) / temperature), in 0..1, and every filter is a
floor under weights: min_p names it; top_k and top_p search it, several candidates a pass, by
counting (top_k) or adding up (top_p) what lies above each. Weights are told apart by exponent and
the first 12 bits behind it: tokens nearer to each other than that (logits from a bfloat16 product
never are, unless equal) count as equally likely, and those as likely as the last one kept are kept
too.

Each pass reads the logits once, many programs a row:

    top -> sum -> [top_k: 6 passes, sum] -> [top_p: 6 passes, sum] -> pick

A pass leaves, for each candidate, what each program found; the next kernel narrows the interval by
it. What a pass reads and what it leaves are two copies that take turns.

The uniform number is the same hash of (seed, position) as on CPU ranks.
"""

# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch

from nitsum.kernels.language import cdiv, jit, next_power_of_2, tl
from nitsum.kernels.sampling_table import GREEDY_BELOW, LINE_INTS, SamplingNeeds
from nitsum.kernels.shape_logits import load_float

PART = 8192
"""Logits a program reads."""
WAYS = 8
PASSES = 6
"""(WAYS + 1) ** PASSES candidates cover all keys from `_LOWEST` to `_HIGHEST`."""

_LINE: tl.constexpr = tl.constexpr(LINE_INTS)
_GREEDY_BELOW: tl.constexpr = tl.constexpr(GREEDY_BELOW)
_SHIFT: tl.constexpr = tl.constexpr(11)  # of float32 bits: 12 bits of the mantissa stay
_HIGHEST: tl.constexpr = tl.constexpr(127 << 12)  # key of weight 1, the best token's
_LOWEST: tl.constexpr = tl.constexpr(87 << 12)
"""Key of weight 2^-40. What lies below adds nothing to a sum, and only a floor can exclude it."""


class DrawBuffers(NamedTuple):
    """Scratch for up to m draws."""

    tops: torch.Tensor  # [m, parts] float32
    top_ids: torch.Tensor  # [m, parts] int32
    sums: torch.Tensor  # [m, parts] float32
    floors: torch.Tensor  # [2, m, 2] int32: the floor is at least the first key, below the second
    found: torch.Tensor  # [2, m, parts, WAYS] float32: counted or added up at each candidate
    wanted: torch.Tensor  # [m] float32


def draw_buffers(max_draws: int, vocab: int, device: torch.device | str) -> DrawBuffers:
    parts = cdiv(vocab, PART)

    def make(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return DrawBuffers(
        make(max_draws, parts), make(max_draws, parts, dtype=torch.int32), make(max_draws, parts),
        make(2, max_draws, 2, dtype=torch.int32), make(2, max_draws, parts, WAYS), make(max_draws),
    )  # fmt: skip


# --- one draw's state ------------------------------------------------------------------------


@jit
def _best(tops, top_ids, i, parts, PARTS: tl.constexpr):
    """(largest logit of the row, first token that has it)"""
    p = tl.arange(0, PARTS)
    values = tl.load(tops + i * parts + p, mask=p < parts, other=-float("inf"))
    top = tl.max(values, 0)
    ids = tl.load(top_ids + i * parts + p, mask=p < parts, other=0)
    return top, tl.min(tl.where((values == top) & (p < parts), ids, 2147483647), 0)


@jit
def _weights(row, at, vocab, top, temperature):
    x = tl.load(row + at, mask=at < vocab, other=-float("inf"))
    return tl.exp((x - top) / temperature)


@jit
def _key(weight):
    return weight.to(tl.int32, bitcast=True) >> _SHIFT


@jit
def _splitmix(value):
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@jit
def _uniform(line, position):
    """52 bits of a hash of (seed, position), in [0, 1), float64."""
    low = tl.load(line + 12).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(line + 13).to(tl.uint32, bitcast=True).to(tl.uint64)
    mixed = _splitmix(_splitmix(low | (high << 32)) + position.to(tl.uint64))
    return (mixed >> 12).to(tl.float64) * 2.220446049250313e-16


# --- passes over the logits --------------------------------------------------------------------


@jit
def _top(logits, tops, top_ids, row_stride, vocab, PART: tl.constexpr):
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    x = tl.load(logits + i * row_stride + at, mask=at < vocab, other=-float("inf"))
    top = tl.max(x, 0)
    place = i * tl.num_programs(1) + part
    tl.store(tops + place, top)
    tl.store(top_ids + place, tl.min(tl.where((x == top) & (at < vocab), at, 2147483647), 0))


@jit
def _narrowed(floors, found, i, parts, need, PARTS: tl.constexpr, WAYS: tl.constexpr):
    """(floor, high) after a pass: from the last candidate with enough above it to the next one."""
    floor, high = tl.load(floors + i * 2), tl.load(floors + i * 2 + 1)
    low = tl.maximum(floor, _LOWEST)
    p, ways = tl.arange(0, PARTS), tl.arange(0, WAYS)
    at = found + (i * parts + p)[:, None] * WAYS + ways[None, :]
    above = tl.sum(tl.load(at, mask=(p < parts)[:, None], other=0.0), 0)
    step = tl.maximum((high - low) // WAYS, 1)
    enough = tl.sum((above >= need).to(tl.int32), 0)
    new_floor = tl.where(enough > 0, tl.minimum(low + enough * step, _HIGHEST), floor)
    new_high = tl.where(enough < WAYS, tl.minimum(high, low + (enough + 1) * step), high)
    return tl.where(need > 0, new_floor, floor), tl.where(need > 0, new_high, high)


@jit
def _sum(
    logits, table, slots, tops, top_ids, floors, found, wanted, new_floors, sums, row_stride, vocab,
    FIRST: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Weight of each part above the floor: what min_p says (FIRST), or the last pass found."""
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    slot = tl.load(slots + i).to(tl.int64)
    if slot < 0:
        return
    line = table + slot * _LINE
    temperature = load_float(line, 0)
    if temperature < _GREEDY_BELOW:
        return
    if FIRST:
        floor = _key(load_float(line, 2))
    else:
        floor, _ = _narrowed(floors, found, i, parts, tl.load(wanted + i), PARTS, WAYS)
    if part == 0:
        tl.store(new_floors + i * 2, floor)
    top, _ = _best(tops, top_ids, i, parts, PARTS)
    w = _weights(logits + i * row_stride, part * PART + tl.arange(0, PART), vocab, top, temperature)
    tl.store(sums + i * parts + part, tl.sum(tl.where(_key(w) >= floor, w, 0.0), 0))


@jit
def _need(line, sums, i, parts, vocab, COUNTS: tl.constexpr, PARTS: tl.constexpr):
    """How many, or how much, is wanted above the floor; 0: this draw searches nothing."""
    need = 0.0
    if load_float(line, 0) >= _GREEDY_BELOW:
        if COUNTS:
            top_k = tl.load(line + 6)
            if (top_k > 0) & (top_k < vocab):
                need = top_k.to(tl.float32)
        else:
            top_p = load_float(line, 1)
            if top_p < 1.0:
                p = tl.arange(0, PARTS)
                total = tl.sum(tl.load(sums + i * parts + p, mask=p < parts, other=0.0), 0)
                need = tl.maximum(top_p, 1e-30) * total
    return need


@jit
def _search(
    logits, table, slots, tops, top_ids, sums, floors, found, wanted, new_floors, new_found,
    row_stride, vocab, FIRST: tl.constexpr, COUNTS: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Count, or add up, what lies at or above each of WAYS candidates."""
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = tl.num_programs(1)
    slot = tl.load(slots + i).to(tl.int64)
    if slot < 0:
        return
    line = table + slot * _LINE
    if FIRST:
        need = _need(line, sums, i, parts, vocab, COUNTS, PARTS)
        floor, high = tl.load(floors + i * 2), _HIGHEST + 1
        if part == 0:
            tl.store(wanted + i, need)
    else:
        need = tl.load(wanted + i)
        floor, high = _narrowed(floors, found, i, parts, need, PARTS, WAYS)
    if part == 0:
        tl.store(new_floors + i * 2, floor)
        tl.store(new_floors + i * 2 + 1, high)
    if need == 0.0:
        return
    low = tl.maximum(floor, _LOWEST)
    step = tl.maximum((high - low) // WAYS, 1)
    top, _ = _best(tops, top_ids, i, parts, PARTS)
    at = part * PART + tl.arange(0, PART)
    w = _weights(logits + i * row_stride, at, vocab, top, load_float(line, 0))
    key = _key(w)
    for way in tl.static_range(WAYS):
        above = key >= low + (way + 1) * step
        amount = tl.sum(above.to(tl.float32) if COUNTS else tl.where(above, w, 0.0), 0)
        tl.store(new_found + (i * parts + part) * WAYS + way, amount)


@jit
def _pick(
    logits, table, slots, positions, tops, top_ids, floors, sums, tokens, row_stride, vocab, parts,
    RANDOM: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    top, token = _best(tops, top_ids, i, parts, PARTS)
    slot = tl.load(slots + i).to(tl.int64)
    if RANDOM:
        line = table + tl.maximum(slot, 0) * _LINE
        temperature = load_float(line, 0)
        if (slot >= 0) & (temperature >= _GREEDY_BELOW):
            p = tl.arange(0, PARTS)
            mass = tl.load(sums + i * parts + p, mask=p < parts, other=0.0).to(tl.float64)
            until = tl.cumsum(mass, 0)
            target = _uniform(line, tl.load(positions + i)) * tl.sum(mass, 0)
            last = tl.max(tl.where(mass > 0, p, 0), 0)
            part = tl.minimum(tl.sum((until <= target).to(tl.int32), 0), last)
            before = tl.sum(tl.where(p < part, mass, 0.0), 0)
            j = tl.arange(0, PART)
            w = _weights(logits + i * row_stride, part * PART + j, vocab, top, temperature)
            w = tl.where(_key(w) >= tl.load(floors + i * 2), w, 0.0).to(tl.float64)
            passed = tl.sum((before + tl.cumsum(w, 0) <= target).to(tl.int32), 0)
            # Sums of parts and of tokens round differently: never go past the last one kept.
            token = part * PART + tl.minimum(passed, tl.max(tl.where(w > 0, j, 0), 0))
    tl.store(tokens + i, token.to(tokens.dtype.element_ty))


def draw(
    logits: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    needs: SamplingNeeds,
    buffers: DrawBuffers,
    out: torch.Tensor,
) -> None:
    """Draw a token for each row of float32 `logits` [m, V] (already shaped) into `out` [m].

    table from `sampling_table`; slots (-1: padding) and positions (of the token to
    be drawn) are [m] int32. Draws that need less than `needs` are still drawn by their own rules.
    """
    m, vocab = logits.shape
    assert logits.dtype == torch.float32
    parts = cdiv(vocab, PART)
    size = {"PARTS": next_power_of_2(parts), "PART": PART, "num_warps": 8}
    b, stride = buffers, logits.stride(0)
    _top[(m, parts)](logits, b.tops, b.top_ids, stride, vocab, PART=PART, num_warps=8)
    turn = 0
    if needs.random:
        turn = _sum_up(logits, table, slots, b, turn, first=True)
        for counts in (True,) * needs.top_k + (False,) * needs.top_p:
            turn = _search_floor(logits, table, slots, b, turn, counts=counts)
            turn = _sum_up(logits, table, slots, b, turn, first=False)
    _pick[(m,)](
        logits, table, slots, positions, b.tops, b.top_ids, b.floors[turn], b.sums, out, stride,
        vocab, parts, RANDOM=needs.random, **size,
    )  # fmt: skip


def _sum_up(
    logits: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    b: DrawBuffers,
    turn: int,
    *,
    first: bool,
) -> int:
    """Reads the copies of `turn`; returns which copy it left the floors in."""
    m, vocab = logits.shape
    parts = cdiv(vocab, PART)
    _sum[(m, parts)](
        logits, table, slots, b.tops, b.top_ids, b.floors[turn], b.found[turn], b.wanted,
        b.floors[1 - turn], b.sums, logits.stride(0), vocab,
        FIRST=first, PART=PART, PARTS=next_power_of_2(parts), WAYS=WAYS, num_warps=8,
    )  # fmt: skip
    return 1 - turn


def _search_floor(
    logits: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    b: DrawBuffers,
    turn: int,
    *,
    counts: bool,
) -> int:
    """All passes of a search, the first from the floors of `turn`; returns the copy of the last."""
    m, vocab = logits.shape
    parts = cdiv(vocab, PART)
    for i in range(PASSES):
        _search[(m, parts)](
            logits, table, slots, b.tops, b.top_ids, b.sums, b.floors[turn], b.found[turn],
            b.wanted, b.floors[1 - turn], b.found[1 - turn], logits.stride(0), vocab,
            FIRST=i == 0, COUNTS=counts, PART=PART, PARTS=next_power_of_2(parts), WAYS=WAYS,
            num_warps=8,
        )  # fmt: skip
        turn = 1 - turn
    return turn


def greedy(logits: torch.Tensor, buffers: DrawBuffers, out: torch.Tensor) -> None:
    """The first of the largest logits of each row of float32 [m, V], into `out` [m]."""
    slots = buffers.floors  # not read
    draw(logits, slots, slots, slots, SamplingNeeds(), buffers, out)


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of raw float32 logits [m, V]: (logprob [m], top ids [m, num_top], their logprobs)."""
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    drawn = logits.gather(1, tokens.long()[:, None]) - log_sum
    top = logits.topk(num_top, -1)
    return drawn[:, 0], top.indices, top.values - log_sum
