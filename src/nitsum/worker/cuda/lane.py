"""One lane as a rank computes it: eager steps of any shape, and graphs for decode.

    decode, n sequences   the smallest bucket's graph:  prepare | plan | forward       -> logits
                          one of its sampling graphs:   draw | broadcast | record      -> tokens
    anything else         the same calls, one by one

All graphs of a rank share one pool, the largest captured first, and one stream. Members of a group
capture the same bucket at the same time: the run before a capture meets in collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nitsum.kernels.attention import AttentionBackend, HostLengths, Sequences
from nitsum.kernels.prepare import StepTensors, prepare
from nitsum.kernels.sampling_table import SamplingNeeds
from nitsum.messages import Work
from nitsum.model.cuda_ops import CudaBackend
from nitsum.model.decoder import forward
from nitsum.model.interface import KvPages, StepInput
from nitsum.model.views import ModelWeights
from nitsum.shape import Geometry
from nitsum.worker.cuda.comm import CudaComm
from nitsum.worker.cuda.sampling import CAPTURED, DeviceSampler, Draws
from nitsum.worker.cuda.state import DeviceState

MakeAttention = Callable[[int, bool], AttentionBackend]
"""(sequences, decode only) -> attention for steps of up to that many."""


@dataclass(frozen=True)
class DecodeGraph:
    """Decode of up to `size` sequences."""

    size: int
    tensors: StepTensors
    attention: AttentionBackend
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [size, V] float32
    draws: dict[SamplingNeeds, torch.cuda.CUDAGraph]


class CudaLane:
    """A group of this rank: its shard, its pages, its graphs."""

    def __init__(
        self,
        geometry: Geometry,
        weights: ModelWeights,
        comm: CudaComm,
        pages: KvPages,
        state: DeviceState,
        tensors: StepTensors,
        sampler: DeviceSampler,
        rope: torch.Tensor,
        make_attention: MakeAttention,
    ) -> None:
        """`tensors` hold the largest step; lanes of a rank share them, since steps follow each
        other."""
        self.comm = comm
        self.pages = pages
        self._geometry = geometry
        self._weights = weights
        self._state = state
        self._tensors = tensors
        self._sampler = sampler
        self._rope = rope
        self._make_attention = make_attention
        self._mixed = make_attention(tensors.contexts.shape[0], False)
        self._graphs: dict[int, DecodeGraph] = {}

    @property
    def sizes(self) -> list[int]:
        """Buckets there are graphs for."""
        return sorted(self._graphs)

    # -- a step --

    def decode(self, size: int, work: Sequence[Work]) -> tuple[torch.Tensor, Draws]:
        """Logits [size, V] of the work at hand by the graph for `size`."""
        captured = self._graphs[size]
        if captured.attention.plans_on_host:
            captured.attention.plan(_sequences(captured.tensors), decode_lengths(work, size))
        captured.graph.replay()
        return captured.logits, _draws(captured.tensors)

    def draw_captured(self, size: int, needs: SamplingNeeds) -> None:
        """By a graph, from the logits of the last `decode` of this size."""
        self._graphs[size].draws[needs].replay()

    def mixed(self, work: Sequence[Work]) -> tuple[torch.Tensor, Draws]:
        """Logits [m, V] of the work at hand, kernel by kernel."""
        num_tokens = sum(part.num_tokens for part in work)
        num_draws = sum(part.samples for part in work)
        tensors = self._tensors.narrow(num_tokens, len(work))
        self._prepare(tensors, decode=False)
        lengths = HostLengths(
            [part.num_tokens for part in work], [part.start + part.num_tokens for part in work]
        )
        self._mixed.plan(_sequences(tensors), lengths)
        logits = self._forward(tensors, self._mixed, num_draws)
        draws = _draws(tensors)
        return logits, Draws(draws.slots[:num_draws], draws.positions[:num_draws])

    def _prepare(self, tensors: StepTensors, *, decode: bool) -> None:
        state = self._state
        work = state.work[: tensors.contexts.shape[0]]
        prepare(state.rows, state.tables, work, state.block_tokens, tensors, decode=decode)

    def _forward(
        self, tensors: StepTensors, attention: AttentionBackend, num_draws: int
    ) -> torch.Tensor:
        step = StepInput(
            tokens=tensors.tokens,
            positions=tensors.positions,
            kv_slots=tensors.kv_slots,
            page_table=tensors.page_table,
            spans=(),
            sample_rows=tensors.sample_rows[:num_draws],
        )
        backend = CudaBackend(attention, self._rope)
        return forward(self._geometry, self._weights, self.comm, self.pages, step, backend)

    # -- capture --

    def capture(self, size: int, stream: torch.cuda.Stream, pool: Any) -> None:
        """Make the graphs for `size`; padding is all the work there is, so no page is touched."""
        tensors = self._tensors.narrow(size, size)
        attention = self._make_attention(size, True)
        lengths = decode_lengths((), size)
        if attention.plans_on_host:
            attention.plan(_sequences(tensors), lengths)

        def step() -> torch.Tensor:
            self._prepare(tensors, decode=True)
            if not attention.plans_on_host:
                attention.plan(_sequences(tensors), None)
            return self._forward(tensors, attention, size)

        self._state.work.fill_(-1)
        graph, logits = _capture(step, stream, pool)
        draws: dict[SamplingNeeds, torch.cuda.CUDAGraph] = {}
        for needs in CAPTURED:
            draws[needs], _ = _capture(self._drawing(logits, tensors, needs), stream, pool)
        self._graphs[size] = DecodeGraph(size, tensors, attention, graph, logits, draws)

    def _drawing(
        self, logits: torch.Tensor, tensors: StepTensors, needs: SamplingNeeds
    ) -> Callable[[], None]:
        return lambda: self._sampler.draw(logits, _draws(tensors), needs, self.comm)


def _capture(
    call: Callable[[], Any], stream: torch.cuda.Stream, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run once, so that all is compiled and sized, then capture; returns what `call` made."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = call()
    return graph, result


def _sequences(tensors: StepTensors) -> Sequences:
    return Sequences(tensors.query_starts, tensors.contexts, tensors.page_table)


def _draws(tensors: StepTensors) -> Draws:
    return Draws(tensors.sample_slots, tensors.sample_positions)


def decode_lengths(work: Sequence[Work], size: int) -> HostLengths:
    """One token each; padding has no context."""
    padding = size - len(work)
    return HostLengths([1] * size, [part.start + 1 for part in work] + [0] * padding)
