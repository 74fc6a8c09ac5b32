"""One lane as a rank computes it: graphs for the shapes of most steps, kernel by kernel for others.

    decode        graph: prepare | plan | layers | logits     graph: draw | broadcast | record
    with chunks   graph: prepare | plan | layers              logits | draw | broadcast | record
    larger        prepare | plan | layers | logits | draw | broadcast | record

All graphs of a rank share one pool, the largest captured first, and one stream. Members of a group
capture the same shape at the same time: the run before a capture meets in collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nitsum.kernels.attention import AttentionBackend, HostLengths, Sequences
from nitsum.kernels.prepare import StepTensors, prepare
from nitsum.kernels.sampling_table import SamplingNeeds
from nitsum.messages import Work
from nitsum.model.cuda_ops import CudaBackend
from nitsum.model.decoder import compute_logits, hidden_states
from nitsum.model.interface import KvPages, StepInput
from nitsum.model.views import ModelWeights
from nitsum.shape import Geometry
from nitsum.worker.cuda.buckets import StepShape, chunk_widths, padded_draws, shape_for
from nitsum.worker.cuda.comm import CudaComm
from nitsum.worker.cuda.sampling import CAPTURED, DeviceSampler, Draws
from nitsum.worker.cuda.state import DeviceState

MakeAttention = Callable[[int, bool], AttentionBackend]
"""(sequences, decode only) -> attention for steps of up to that many."""


@dataclass(frozen=True)
class StepGraph:
    """Steps of one shape."""

    tensors: StepTensors
    attention: AttentionBackend
    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    """[tokens, hidden], normed."""
    logits: torch.Tensor | None
    """[sequences, V] float32, of decode shapes."""
    draws: dict[SamplingNeeds, torch.cuda.CUDAGraph]
    """Of decode shapes."""


class StepResult(NamedTuple):
    """What a step computed, valid until the lane's next one."""

    logits: torch.Tensor
    """[m, V] float32, or [sequences, V] of a decode shape."""
    draws: Draws
    hidden: torch.Tensor
    """[n, hidden], normed."""
    rows: torch.Tensor
    """[m] int64: which of them each draw is from."""


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
        self._eager = make_attention(tensors.contexts.shape[0], False)
        self._graphs: dict[StepShape, StepGraph] = {}
        self._shapes: list[StepShape] = []
        self._planned: torch.cuda.Event | None = None

    def shape_for(self, work: Sequence[Work]) -> StepShape:
        """What a step of this work is padded to."""
        max_num_seqs = self._tensors.contexts.shape[0]
        # A library that plans on the host wants the number of sequences it was made for.
        fixed = self._eager.plans_on_host
        widths = [max_num_seqs] if fixed else chunk_widths(max_num_seqs)
        return shape_for(work, self._shapes, widths)

    # -- a step --

    def compute(self, shape: StepShape, work: Sequence[Work]) -> StepResult:
        """The work at hand."""
        num_draws = sum(part.samples for part in work)
        if not shape.has_graph:
            return self._compute_eagerly(shape, work, num_draws)
        captured = self._graphs[shape]
        if captured.attention.plans_on_host:
            self._plan_on_host(captured.attention, captured.tensors, work, shape)
        captured.graph.replay()
        if captured.logits is None:
            return self._result(captured.hidden, captured.tensors, num_draws)
        tensors = captured.tensors
        return StepResult(captured.logits, _draws(tensors), captured.hidden, tensors.sample_rows)

    def draw_captured(self, shape: StepShape, needs: SamplingNeeds) -> None:
        """By a graph, from the logits of the last `compute` of this decode shape."""
        self._graphs[shape].draws[needs].replay()

    def _compute_eagerly(
        self, shape: StepShape, work: Sequence[Work], num_draws: int
    ) -> StepResult:
        tensors = self._tensors.narrow(shape.num_tokens, shape.num_seqs)
        if self._eager.plans_on_host:
            self._plan_on_host(self._eager, tensors, work, shape)
        else:
            self._prepare(tensors, decode=False)
            self._eager.plan(_sequences(tensors), None)
        return self._result(self._hidden(tensors, self._eager), tensors, num_draws)

    def _result(self, hidden: torch.Tensor, tensors: StepTensors, num_draws: int) -> StepResult:
        logits = self._logits(hidden, tensors, num_draws)
        draws, rows = _draws(tensors).first(num_draws), tensors.sample_rows[:num_draws]
        return StepResult(logits, draws, hidden, rows)

    def _plan_on_host(
        self,
        attention: AttentionBackend,
        tensors: StepTensors,
        work: Sequence[Work],
        shape: StepShape,
    ) -> None:
        """What such a library reads of the step, it reads now, before any graph.

        It writes its plan into pinned memory that its last plan may still be copied from: wait
        until the device has come to where that copy is, which is before the step that runs now.
        """
        self._prepare(tensors, decode=shape.is_decode)
        if self._planned is not None:
            self._planned.synchronize()
        attention.plan(_sequences(tensors), lengths_of(work, shape))
        self._planned = torch.cuda.Event()
        self._planned.record()

    def _prepare(self, tensors: StepTensors, *, decode: bool) -> None:
        state = self._state
        work = state.work[: tensors.contexts.shape[0]]
        prepare(state.rows, state.tables, work, state.block_tokens, tensors, decode=decode)

    def _hidden(self, tensors: StepTensors, attention: AttentionBackend) -> torch.Tensor:
        step = StepInput(
            tokens=tensors.tokens,
            positions=tensors.positions,
            kv_slots=tensors.kv_slots,
            page_table=tensors.page_table,
            spans=(),
            sample_rows=tensors.sample_rows,
        )
        backend = CudaBackend(attention, self._rope, self.comm.reduce_norm)
        return hidden_states(self._geometry, self._weights, self.comm, self.pages, step, backend)

    def _logits(self, hidden: torch.Tensor, tensors: StepTensors, num_draws: int) -> torch.Tensor:
        """[num_draws, V], computed for a few more rows than that: see `padded_draws`."""
        size = padded_draws(num_draws, len(tensors.sample_rows))
        rows = hidden[tensors.sample_rows[:size]]
        return compute_logits(self._geometry, self._weights, self.comm, rows)[:num_draws]

    # -- capture --

    def capture(self, shape: StepShape, stream: torch.cuda.Stream, pool: Any) -> None:
        """Make the graphs for `shape`; padding is all the work there is, so no page is touched."""
        tensors = self._tensors.narrow(shape.num_tokens, shape.num_seqs)
        attention = self._make_attention(shape.num_seqs, shape.is_decode)
        self._state.work.fill_(-1)
        if attention.plans_on_host:
            self._plan_on_host(attention, tensors, (), shape)

        def step() -> tuple[torch.Tensor, torch.Tensor | None]:
            if not attention.plans_on_host:
                self._prepare(tensors, decode=shape.is_decode)
                attention.plan(_sequences(tensors), None)
            hidden = self._hidden(tensors, attention)
            decode = shape.is_decode
            return hidden, self._logits(hidden, tensors, shape.num_seqs) if decode else None

        graph, (hidden, logits) = _capture(step, stream, pool)
        draws: dict[SamplingNeeds, torch.cuda.CUDAGraph] = {}
        if logits is not None:
            for needs in CAPTURED:
                draws[needs], _ = _capture(self._drawing(logits, tensors, needs), stream, pool)
        self._graphs[shape] = StepGraph(tensors, attention, graph, hidden, logits, draws)
        self._shapes = sorted(self._graphs)

    def _drawing(
        self, logits: torch.Tensor, tensors: StepTensors, needs: SamplingNeeds
    ) -> Callable[[], None]:
        return lambda: self._sampler.draw(logits, _draws(tensors), needs, self.comm)


def _capture(
    call: Callable[[], Any], stream: torch.cuda.Stream, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run once, so that all is compiled and sized, then capture; returns what `call` made.

    The first replay brings the graph to the device, which took 20 ms: it must not be a request's.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


def _sequences(tensors: StepTensors) -> Sequences:
    return Sequences(tensors.query_starts, tensors.contexts, tensors.page_table)


def _draws(tensors: StepTensors) -> Draws:
    return Draws(tensors.sample_slots, tensors.sample_positions)


def lengths_of(work: Sequence[Work], shape: StepShape) -> HostLengths:
    """With padding: no context, and one token in decode shapes, else none."""
    padding = shape.num_seqs - len(work)
    num_tokens = [part.num_tokens for part in work] + [int(shape.is_decode)] * padding
    contexts = [part.start + part.num_tokens for part in work] + [0] * padding
    return HostLengths(num_tokens, contexts)
