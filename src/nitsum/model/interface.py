"""What the decoder is given for one step, and by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Span(NamedTuple):
    """One sequence's part of a step: rows `first .. first + num_tokens` of the step's tokens."""

    first: int
    num_tokens: int
    context: int
    """Positions in the KV cache once this step has written its own: start + num_tokens."""


@dataclass(frozen=True)
class StepInput:
    """One forward pass on one rank. n tokens, s sequences, m sampled positions."""

    tokens: torch.Tensor  # [n] int64
    positions: torch.Tensor  # [n] int64
    kv_slots: torch.Tensor  # [n] int64: page * block_tokens + offset, in this lane's pages
    page_table: torch.Tensor  # [s, max_pages] int64, padded with 0
    spans: tuple[Span, ...]  # [s], in row order
    sample_rows: torch.Tensor  # [m] int64: rows whose logits are wanted


class Comm(Protocol):
    """Collectives of one lane, called by all its ranks in the same order."""

    @property
    def degree(self) -> int: ...

    @property
    def shard(self) -> int:
        """The shard this rank works on at this degree (bit-reversed; see `Group.shard_of`)."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the lane, in shard order; [n, hidden] in and out (may be the same memory)."""
        ...

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        """[m, V/t] of this rank's shard in, [m, V] in vocabulary order out, on every rank."""
        ...


class KvPages(Protocol):
    """The arena, seen as the paged cache of one degree."""

    def keys(self, layer: int) -> torch.Tensor:
        """[pages, heads, block_tokens, head_dim]"""
        ...

    def values(self, layer: int) -> torch.Tensor:
        """[pages, heads, block_tokens, head_dim]"""
        ...
