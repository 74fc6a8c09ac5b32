"""Paged attention against attention written out over each sequence's own keys."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.model.attention import PagedAttention, decode_groups, num_blocks, written_rows
from nitsum.model.interface import Span
from tests.lanes import Part, compose

torch.set_num_threads(1)

HEADS, GROUP, DIM, BLOCK = 2, 3, 8, 4

sequences = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([1, 1, 1, 2, 5, 9])), min_size=1, max_size=5
)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """q [n, heads, g, d] at positions start.. over k, v [context, heads, d], one row at a time."""
    rows = []
    for row in range(q.shape[0]):
        seen = start + row + 1
        scores = torch.einsum("hgd,shd->hgs", q[row], k[:seen]) * DIM**-0.5
        rows.append(torch.einsum("hgs,shd->hgd", scores.softmax(-1), v[:seen]))
    return torch.stack(rows).flatten(1)


@settings(max_examples=60)
@given(sequences, st.integers(0, 1000))
def test_mixed_steps_equal_attention_written_out(lengths: list, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_pages = 1 + sum(num_blocks(start + n, BLOCK) for start, n in lengths)
    free = torch.randperm(num_pages, generator=generator).tolist()
    # What no sequence owns is large, so that reading it would show.
    cache = torch.full((2, num_pages, HEADS, BLOCK, DIM), 50.0)
    parts, kv = [], []
    for start, n in lengths:
        pages = [free.pop() for _ in range(num_blocks(start + n, BLOCK))]
        parts.append(Part([0] * n, start, pages))
        kv.append(torch.randn(2, start + n, HEADS, DIM, generator=generator))
        slots = torch.tensor([pages[p // BLOCK] * BLOCK + p % BLOCK for p in range(start + n)])
        rows = written_rows(slots, HEADS, BLOCK)
        for side in (0, 1):
            cache[side].view(-1, DIM).index_copy_(0, rows, kv[-1][side].reshape(-1, DIM))
    step = compose(parts, BLOCK)
    q = torch.randn(len(step.tokens), HEADS, GROUP, DIM, generator=generator)
    ours = PagedAttention(step, HEADS, BLOCK, torch.float32)(q, cache[0], cache[1])
    for span, part, (k, v) in zip(step.spans, parts, kv, strict=True):
        rows = slice(span.first, span.first + span.num_tokens)
        expected = naive(q[rows], k, v, part.start)
        torch.testing.assert_close(ours[rows], expected, rtol=1e-4, atol=1e-5)


@given(st.lists(st.tuples(st.sampled_from([1, 1, 4]), st.integers(4, 5000)), max_size=40))
def test_decode_groups_cover_each_once_and_waste_at_most_half(parts: list) -> None:
    spans = tuple(Span(0, n, context) for n, context in parts)
    groups = decode_groups(spans, BLOCK)
    covered = sorted(index for group in groups for index in group)
    assert covered == [index for index, span in enumerate(spans) if span.num_tokens == 1]
    for group in groups:
        blocks = [num_blocks(spans[index].context, BLOCK) for index in group]
        assert len(blocks) * max(blocks) <= 2 * sum(blocks)
