"""The seam between a step and whichever library attends over head-major pages.

Pages are `[pages, heads, block_tokens, head_dim]`; a query head reads the KV head of its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class HostLengths(NamedTuple):
    """What the host knows of a step, for libraries that plan there. Padding included."""

    num_tokens: list[int]  # [s]
    contexts: list[int]  # [s]


@dataclass(frozen=True)
class Sequences:
    """The s sequences of a step, on the device; see `StepTensors`."""

    query_starts: torch.Tensor  # [s + 1] int32
    contexts: torch.Tensor  # [s] int32; 0: padding
    page_table: torch.Tensor  # [s, max_pages] int32

    @property
    def num_seqs(self) -> int:
        return self.contexts.shape[0]


class AttentionBackend(Protocol):
    """Attention for steps of up to a fixed size on one rank at one degree.

    `plan` is called once before each step (before a graph's replay where it works on the host,
    inside the capture where it works on the device: `plans_on_host` says which), then `run` once a
    layer. Both are given the buffers that were there when the graph was captured.
    """

    plans_on_host: bool

    def plan(self, sequences: Sequences, lengths: HostLengths | None) -> None:
        """Look at the step; `lengths` is needed by those that plan on the host."""
        ...

    def run(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Causal attention of q [n, G, g, d] over one layer's pages into out, shaped as q."""
        ...
