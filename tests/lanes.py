"""A lane in one process: each rank is a thread, and collectives meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nitsum.model.decoder import forward
from nitsum.model.interface import Span, StepInput
from nitsum.model.views import ModelWeights
from nitsum.plan import Group
from nitsum.shape import Geometry


class ThreadComm:
    """`Comm` of one rank among threads that share `parts` and `barrier`."""

    def __init__(
        self, group: Group, rank: int, parts: dict[int, torch.Tensor], barrier: threading.Barrier
    ) -> None:
        self.degree = group.degree
        self.shard = group.shard_of(rank)
        self._parts = parts
        self._barrier = barrier
        self._buffer: torch.Tensor | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, in memory the next all-reduce overwrites (as the interface allows)."""
        total = torch.stack(self._meet(x)).sum(0)
        if self._buffer is None or self._buffer.shape != total.shape:
            self._buffer = torch.empty_like(total)
        return self._buffer.copy_(total)

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meet(logits), 1)

    def _meet(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.shard] = x.clone()
        self._barrier.wait()
        parts = [self._parts[shard] for shard in range(self.degree)]
        self._barrier.wait()
        return parts


@dataclass
class MemoryPages:
    """`KvPages` in plain memory."""

    cache: torch.Tensor  # [2, layers, pages, heads, block_tokens, head_dim]

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        degree: int,
        num_pages: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> MemoryPages:
        heads = len(geometry.kv_heads(degree, 0))
        layers, d = geometry.shape.num_layers, geometry.shape.head_dim
        return cls(torch.zeros(2, layers, num_pages, heads, block_tokens, d, dtype=dtype))

    def keys(self, layer: int) -> torch.Tensor:
        return self.cache[0, layer]

    def values(self, layer: int) -> torch.Tensor:
        return self.cache[1, layer]


class ThreadLane:
    """A group of ranks with weights and pages, stepped together."""

    def __init__(
        self,
        geometry: Geometry,
        group: Group,
        views: Callable[[int], ModelWeights],
        num_pages: int = 32,
        block_tokens: int = 4,
    ) -> None:
        """`views(rank)` are the rank's weights at the group's degree."""
        self.geometry = geometry
        self.group = group
        self.block_tokens = block_tokens
        self.weights = {rank: views(rank) for rank in group.ranks}
        self.pages = {
            rank: MemoryPages.of(
                geometry, group.degree, num_pages, block_tokens, weights.embedding.dtype
            )
            for rank, weights in self.weights.items()
        }
        parts: dict[int, torch.Tensor] = {}
        barrier = threading.Barrier(group.degree, timeout=60)
        self._comms = {rank: ThreadComm(group, rank, parts, barrier) for rank in group.ranks}

    def step(self, step: StepInput) -> torch.Tensor:
        """Logits of rank 0 of the group; all ranks must have the same."""
        with ThreadPoolExecutor(self.group.degree) as pool:
            results = list(pool.map(lambda rank: self._forward(rank, step), self.group.ranks))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)
        return results[0]

    def _forward(self, rank: int, step: StepInput) -> torch.Tensor:
        comm, weights = self._comms[rank], self.weights[rank]
        return forward(self.geometry, weights, comm, self.pages[rank], step)


@dataclass
class Part:
    """What one sequence adds to a step: `tokens` from position `start` on, in `pages`."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


def compose(parts: Sequence[Part], block_tokens: int, all_rows: bool = False) -> StepInput:
    """A `StepInput` that samples after each part, or at every row."""
    spans: list[Span] = []
    positions: list[int] = []
    slots: list[int] = []
    for part in parts:
        spans.append(Span(len(positions), len(part.tokens), part.start + len(part.tokens)))
        own = range(part.start, part.start + len(part.tokens))
        positions += own
        slots += [part.pages[p // block_tokens] * block_tokens + p % block_tokens for p in own]
    width = max(len(part.pages) for part in parts)
    table = [[*part.pages, *[0] * (width - len(part.pages))] for part in parts]
    rows = range(len(positions)) if all_rows else [s.first + s.num_tokens - 1 for s in spans]
    return StepInput(
        torch.tensor([token for part in parts for token in part.tokens]),
        torch.tensor(positions),
        torch.tensor(slots),
        torch.tensor(table),
        tuple(spans),
        torch.tensor(list(rows)),
    )
