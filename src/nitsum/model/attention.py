"""Attention over head-major pages in plain PyTorch.

A layer's keys are `[pages, heads, block_tokens, head_dim]`. Seen as rows of block_tokens x head_dim
values, row `page * heads + head` is one head's part of one block, so a sequence's keys are gathered
straight into `[heads, context, head_dim]` by one row copy:

    pages 7, 2 of 2 heads  ->  rows 14, 4 | 15, 5   =  head 0 of 7, 2 | head 1 of 7, 2

Sequences with one token are attended together; query heads that share a KV head then stand where
query positions usually do, so nothing is repeated. Longer chunks go one by one, with the KV head as
the batch and its query heads reading it through a stride of 0.

Pages are read up to the end of their last block, and masked after that: memory that was never
written must hold finite numbers (an arena starts as zeros).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nitsum.model.interface import Span, StepInput


def written_rows(kv_slots: torch.Tensor, num_heads: int, block_tokens: int) -> torch.Tensor:
    """[n * heads] rows of head_dim values, token-major, where a step's k and v go in a layer."""
    pages, offsets = kv_slots // block_tokens, kv_slots % block_tokens
    heads = torch.arange(num_heads, device=kv_slots.device)
    rows = (pages[:, None] * num_heads + heads) * block_tokens + offsets[:, None]
    return rows.view(-1)


def gathered_rows(pages: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[s, blocks] page ids -> [s * heads * blocks] rows of block_tokens * head_dim values."""
    heads = torch.arange(num_heads, device=pages.device)
    return (pages[:, None, :] * num_heads + heads[:, None]).view(-1)


@dataclass(frozen=True)
class _Decodes:
    """Sequences of one token each, of similar context."""

    tokens: slice | torch.Tensor  # which of the step's tokens
    kv_rows: torch.Tensor  # [b * heads * blocks]
    mask: torch.Tensor  # [b, 1, 1, blocks * block_tokens], added to scores


@dataclass(frozen=True)
class _Chunk:
    """One sequence's prefill chunk."""

    tokens: slice
    kv_rows: torch.Tensor  # [heads * blocks]
    context: int
    mask: torch.Tensor | None  # [num_tokens, context]; None: the chunk is the whole context


class PagedAttention:
    """One step's attention: what all layers share is prepared here."""

    def __init__(
        self, step: StepInput, num_heads: int, block_tokens: int, dtype: torch.dtype
    ) -> None:
        self._num_heads = num_heads
        self._block_tokens = block_tokens
        self._dtype = dtype
        self._groups = [
            self._decodes(step, members) for members in decode_groups(step.spans, block_tokens)
        ]
        self._chunks = [
            self._chunk(step, index) for index, span in enumerate(step.spans) if span.num_tokens > 1
        ]

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """q [n, heads, g, d] over one layer's pages -> [n, heads * g * d]"""
        if len(self._groups) == 1 and not self._chunks:
            return self._attend_decodes(self._groups[0], q, keys, values).flatten(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in self._groups:
            out[group.tokens] = self._attend_decodes(group, q[group.tokens], keys, values)
        for chunk in self._chunks:
            out[chunk.tokens] = self._attend_chunk(chunk, q[chunk.tokens], keys, values)
        return out.flatten(1)

    def _decodes(self, step: StepInput, members: list[int]) -> _Decodes:
        spans = [step.spans[index] for index in members]
        blocks = max(num_blocks(span.context, self._block_tokens) for span in spans)
        device = step.page_table.device
        pages = step.page_table[torch.tensor(members, device=device), :blocks]
        contexts = torch.tensor([span.context for span in spans], device=device)
        positions = torch.arange(blocks * self._block_tokens, device=device)
        hidden = (positions >= contexts[:, None])[:, None, None]
        return _Decodes(
            _token_index(spans, device),
            gathered_rows(pages, self._num_heads),
            self._additive(hidden),
        )

    def _chunk(self, step: StepInput, index: int) -> _Chunk:
        span = step.spans[index]
        blocks = num_blocks(span.context, self._block_tokens)
        rows = gathered_rows(step.page_table[index : index + 1, :blocks], self._num_heads)
        tokens = slice(span.first, span.first + span.num_tokens)
        start = span.context - span.num_tokens
        if start == 0:
            return _Chunk(tokens, rows, span.context, None)
        positions = torch.arange(span.context, device=rows.device)
        hidden = positions > positions[start:, None]
        return _Chunk(tokens, rows, span.context, self._additive(hidden))

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))

    def _attend_decodes(
        self, group: _Decodes, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """q [b, heads, g, d] -> the same shape"""
        shape = (q.shape[0], self._num_heads, -1, q.shape[-1])
        k = gather(keys, group.kv_rows).view(shape)
        v = gather(values, group.kv_rows).view(shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)

    def _attend_chunk(
        self, chunk: _Chunk, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """q [n, heads, g, d] -> the same shape"""
        queries = q.permute(1, 2, 0, 3)  # [heads, g, n, d]
        shape = (self._num_heads, 1, -1, q.shape[-1])
        k = gather(keys, chunk.kv_rows).view(shape)[:, :, : chunk.context]
        v = gather(values, chunk.kv_rows).view(shape)[:, :, : chunk.context]
        wide = (-1, queries.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(
            queries,
            k.expand(wide),
            v.expand(wide),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
        )
        return out.permute(2, 0, 1, 3)


def gather(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[pages, heads, block_tokens, d] -> [len(rows), block_tokens * d]"""
    pages, heads, block_tokens, d = cache.shape
    return cache.view(pages * heads, block_tokens * d).index_select(0, rows)


def num_blocks(context: int, block_tokens: int) -> int:
    return -(-context // block_tokens)


def decode_groups(spans: tuple[Span, ...], block_tokens: int) -> list[list[int]]:
    """Indices of one-token spans, in groups that waste little when padded to their longest.

    One group as long as that copies at most twice what is needed; else one for each power of two of
    blocks, so that a single long sequence does not make all others as dear as itself.
    """
    members = [index for index, span in enumerate(spans) if span.num_tokens == 1]
    if not members:
        return []
    blocks = {index: num_blocks(spans[index].context, block_tokens) for index in members}
    if len(members) * max(blocks.values()) <= 2 * sum(blocks.values()):
        return [members]
    by_size: dict[int, list[int]] = {}
    for index in members:
        by_size.setdefault(blocks[index].bit_length(), []).append(index)
    return list(by_size.values())


def _token_index(spans: list[Span], device: torch.device) -> slice | torch.Tensor:
    firsts = [span.first for span in spans]
    if firsts == list(range(firsts[0], firsts[0] + len(firsts))):
        return slice(firsts[0], firsts[0] + len(firsts))
    return torch.tensor(firsts, device=device)
