"""A step's tensors from the tables a rank keeps on its device, and drawn tokens back into them.

Per step the host sends one small buffer, `work` [s, 4] int32, a line a sequence:
slot (-1: padding), start, num_tokens, samples (0 or 1). Everything else is looked up:

    rows   [slots, row_tokens] int32   token ids of each slot, known and drawn
    tables [slots, max_pages]  int32   pages of each slot, in this lane's numbering
"""

from dataclasses import dataclass

import torch

from nitsum.kernels.language import cdiv, jit, next_power_of_2, tl

TOKENS_PER_PROGRAM = 64
PAGES_PER_TURN = 512


@dataclass(frozen=True)
class StepTensors:
    """One step of at most n tokens and s sequences; the buffers live as long as a graph does.

    Padding tokens have token 0, position 0 and kv slot -1; padding sequences have context 0 and no
    tokens (in a decode step: one token, whose result nobody reads).
    """

    tokens: torch.Tensor  # [n] int64
    positions: torch.Tensor  # [n] int64
    kv_slots: torch.Tensor  # [n] int64
    query_starts: torch.Tensor  # [s + 1] int32: first row of each sequence
    contexts: torch.Tensor  # [s] int32: start + num_tokens
    page_table: torch.Tensor  # [s, max_pages] int32; undefined behind a sequence's own pages
    sample_rows: torch.Tensor  # [s] int64: rows to sample from, in order; then 0
    sample_slots: torch.Tensor  # [s] int32: whose they are; then -1
    sample_positions: torch.Tensor  # [s] int32: position of the token to be drawn; then 0

    @classmethod
    def empty(
        cls, num_tokens: int, num_seqs: int, max_pages: int, device: torch.device | str
    ) -> "StepTensors":
        """Buffers for up to `num_tokens` tokens of up to `num_seqs` sequences."""

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            tokens=zeros(num_tokens, dtype=torch.int64),
            positions=zeros(num_tokens, dtype=torch.int64),
            kv_slots=zeros(num_tokens, dtype=torch.int64),
            query_starts=zeros(num_seqs + 1),
            contexts=zeros(num_seqs),
            page_table=zeros(num_seqs, max_pages),
            sample_rows=zeros(num_seqs, dtype=torch.int64),
            sample_slots=zeros(num_seqs),
            sample_positions=zeros(num_seqs),
        )

    def narrow(self, num_tokens: int, num_seqs: int) -> "StepTensors":
        """Views of the first `num_tokens` and `num_seqs`."""
        return StepTensors(
            self.tokens[:num_tokens], self.positions[:num_tokens], self.kv_slots[:num_tokens],
            self.query_starts[: num_seqs + 1], self.contexts[:num_seqs],
            self.page_table[:num_seqs], self.sample_rows[:num_seqs],
            self.sample_slots[:num_seqs], self.sample_positions[:num_seqs],
        )  # fmt: skip


@jit
def _copy_pages(table, page_table, count, PAGES: tl.constexpr):
    for first in range(0, count, PAGES):
        i = first + tl.arange(0, PAGES)
        tl.store(page_table + i, tl.load(table + i, mask=i < count), mask=i < count)


@jit
def _order_sample(
    work, s, num_seqs, query_end, samples, slot, end,
    sample_rows, sample_slots, sample_positions, SEQS: tl.constexpr,
):  # fmt: skip
    """Sampling sequences first, in order; the others fill the rest with padding."""
    i = tl.arange(0, SEQS)
    live = (i < num_seqs) & (tl.load(work + i * 4, mask=i < num_seqs, other=-1) >= 0)
    wants = tl.load(work + i * 4 + 3, mask=live, other=0) != 0
    before = tl.sum((wants & (i < s)).to(tl.int32), 0)
    total = tl.sum(wants.to(tl.int32), 0)
    at = tl.where(samples, before, total + s - before)
    tl.store(sample_rows + at, tl.where(samples, query_end - 1, 0).to(tl.int64))
    tl.store(sample_slots + at, tl.where(samples, slot, -1))
    tl.store(sample_positions + at, tl.where(samples, end, 0))


@jit
def _prepare_sequences(
    rows, tables, work, tokens, positions, kv_slots, query_starts, contexts, page_table,
    sample_rows, sample_slots, sample_positions, num_seqs, row_tokens, max_pages, out_pages,
    DECODE: tl.constexpr, PAGE: tl.constexpr, SEQS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    slot = tl.load(work + s * 4)
    live = slot >= 0
    start = tl.load(work + s * 4 + 1, mask=live, other=0)
    count = tl.load(work + s * 4 + 2, mask=live, other=0)
    samples = tl.load(work + s * 4 + 3, mask=live, other=0) != 0
    i = tl.arange(0, SEQS)
    earlier = i < s
    slots = tl.load(work + i * 4, mask=earlier, other=-1)
    first = tl.sum(tl.load(work + i * 4 + 2, mask=slots >= 0, other=0), 0)
    if DECODE:
        first = s
        count = 1
        here = tl.load(rows + slot.to(tl.int64) * row_tokens + start, mask=live, other=0)
        page = tl.load(tables + slot.to(tl.int64) * max_pages + start // PAGE, mask=live, other=0)
        tl.store(tokens + s, here.to(tl.int64))
        tl.store(positions + s, start.to(tl.int64))
        tl.store(kv_slots + s, tl.where(live, page.to(tl.int64) * PAGE + start % PAGE, -1))
    end = start + count
    context = tl.where(live, end, 0)
    tl.store(query_starts + s, first)
    if s == num_seqs - 1:
        tl.store(query_starts + num_seqs, first + count)
    tl.store(contexts + s, context)
    own = tables + slot.to(tl.int64) * max_pages
    _copy_pages(own, page_table + s.to(tl.int64) * out_pages, tl.cdiv(context, PAGE), PAGES)
    _order_sample(
        work, s, num_seqs, first + count, samples, slot, end,
        sample_rows, sample_slots, sample_positions, SEQS,
    )  # fmt: skip


@jit
def _prepare_tokens(
    rows, tables, work, tokens, positions, kv_slots, num_tokens, num_seqs, row_tokens, max_pages,
    PAGE: tl.constexpr, SEQS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Each token finds its sequence: as many as have ended before it."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, SEQS)
    slots = tl.load(work + i * 4, mask=i < num_seqs, other=-1)
    counts = tl.load(work + i * 4 + 2, mask=slots >= 0, other=0)
    ended = tl.cumsum(counts, 0)[None, :] <= t[:, None]
    seq = tl.sum(ended.to(tl.int32), 1)
    first = tl.sum(tl.where(ended, counts[None, :], 0), 1)
    live = t < tl.sum(counts, 0)
    slot = tl.load(work + seq * 4, mask=live, other=0).to(tl.int64)
    start = tl.load(work + seq * 4 + 1, mask=live, other=0)
    position = tl.where(live, start + t - first, 0)
    token = tl.load(rows + slot * row_tokens + position, mask=live, other=0)
    page = tl.load(tables + slot * max_pages + position // PAGE, mask=live, other=0)
    kv_slot = tl.where(live, page.to(tl.int64) * PAGE + position % PAGE, -1)
    written = t < num_tokens
    tl.store(tokens + t, token.to(tl.int64), mask=written)
    tl.store(positions + t, position.to(tl.int64), mask=written)
    tl.store(kv_slots + t, kv_slot, mask=written)


def prepare(
    rows: torch.Tensor,
    tables: torch.Tensor,
    work: torch.Tensor,
    block_tokens: int,
    out: StepTensors,
    *,
    decode: bool,
) -> None:
    """Fill `out` for `work` [s, 4] int32 (s = out's number of sequences), from tables as they are.

    `decode` promises that every sequence has one token, and gives row i to line i of `work`,
    padding included; else lines may have any number, together at most `out`'s number of tokens.
    """
    num_seqs = work.shape[0]
    num_tokens = out.tokens.shape[0]
    assert out.contexts.shape[0] == num_seqs
    assert not decode or num_tokens == num_seqs
    seqs = next_power_of_2(num_seqs)
    tokens = (out.tokens, out.positions, out.kv_slots)
    samples = (out.sample_rows, out.sample_slots, out.sample_positions)
    row_tokens, max_pages = rows.shape[1], tables.shape[1]
    _prepare_sequences[(num_seqs,)](
        rows, tables, work, *tokens, out.query_starts, out.contexts, out.page_table, *samples,
        num_seqs, row_tokens, max_pages, out.page_table.stride(0),
        DECODE=decode, PAGE=block_tokens, SEQS=seqs, PAGES=PAGES_PER_TURN,
    )  # fmt: skip
    if not decode:
        _prepare_tokens[(cdiv(num_tokens, TOKENS_PER_PROGRAM),)](
            rows, tables, work, *tokens, num_tokens, num_seqs, row_tokens, max_pages,
            PAGE=block_tokens, SEQS=seqs, TOKENS=TOKENS_PER_PROGRAM,
        )  # fmt: skip


@jit
def _record(rows, known_counts, slots, positions, tokens, m, row_tokens, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=i < m, other=-1).to(tl.int64)
    live = slot >= 0
    position = tl.load(positions + i, mask=live, other=0)
    live &= position < row_tokens
    known = position < tl.load(known_counts + slot, mask=live, other=0)
    at = rows + slot * row_tokens + position
    given = tl.load(at, mask=live & known, other=0)
    drawn = tl.load(tokens + i, mask=live, other=0)
    tl.store(at, drawn.to(tl.int32), mask=live & ~known)
    tl.store(tokens + i, given.to(drawn.dtype), mask=live & known)


def record(
    rows: torch.Tensor,
    num_known: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Write drawn `tokens` [m] into their rows; where a token is known, hand that one out instead.

    slots (-1: padding) and positions are [m] int32; num_known [slots] int32: positions below it are
    given (replay, teacher forcing) and stay; `tokens` then receives the given one.
    """
    m = tokens.shape[0]
    if m:
        _record[(cdiv(m, 128),)](
            rows, num_known, slots, positions, tokens, m, rows.shape[1], BLOCK=128
        )
