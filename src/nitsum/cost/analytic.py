"""Step times from first principles: bytes, FLOPs, messages and launches, at measured rates.

A step of n tokens (s of them sampled) at degree t costs, per layer,

    qkv, o, gate_up, down   four GEMMs on 1/t of the rows or columns      GemmRate
    2 norms, rotary, act    elementwise kernels                           LinearRate
    attention               KV bytes in decode + FLOPs in prefill
    2 all-reduces           n * hidden elements each                      Curve per degree

and once the head over the s sampled rows, its gather, and a fixed price per step. Every term is
monotone in every count, hence so is the sum.
"""

from __future__ import annotations

from typing import NamedTuple

from nitsum.cost.machines import Machine
from nitsum.cost.memory import MemoryModel
from nitsum.cost.rates import Rates, all_reduce_curve, rates_for
from nitsum.errors import ConfigError
from nitsum.plan import Lane
from nitsum.shape import Geometry, ModelShape
from nitsum.step import BatchShape, StepWork

_MAX_CACHED = 1 << 16


class StepParts(NamedTuple):
    """Where the time of one step goes, seconds."""

    gemm_s: float
    head_s: float
    elementwise_s: float
    all_reduce_s: float
    attention_s: float
    step_s: float

    @property
    def total_s(self) -> float:
        return sum(self)


class RankShape(NamedTuple):
    """What one rank of a lane computes: local GEMM sizes and bytes per token."""

    gemms: tuple[tuple[int, int], ...]
    """(n, k) of qkv, o, gate_up and down."""
    head: tuple[int, int]
    kv_token_bytes: int
    """K and V of one token in one layer."""
    attention_flops: int
    """Per query token and position of context, in one layer."""
    norm_bytes: int
    """Per token: the residual and the branch in, both out."""
    rope_bytes: int
    act_bytes: int


def rank_shape(geometry: Geometry, degree: int, dtype_bytes: int) -> RankShape:
    """The sizes at `degree`; k and v rows of a replicated head are computed by each holder."""
    shape = geometry.shape
    q_width = geometry.q_heads(degree) * shape.head_dim
    kv_width = max(1, geometry.num_kv_heads // degree) * shape.head_dim
    mlp, hidden = geometry.intermediate_size // degree, shape.hidden_size
    qkv = q_width + 2 * kv_width
    return RankShape(
        gemms=((qkv, hidden), (hidden, q_width), (2 * mlp, hidden), (hidden, mlp)),
        head=(geometry.vocab_size // degree, hidden),
        kv_token_bytes=2 * kv_width * dtype_bytes,
        attention_flops=4 * q_width,
        norm_bytes=4 * hidden * dtype_bytes,
        rope_bytes=2 * qkv * dtype_bytes,
        act_bytes=3 * mlp * dtype_bytes,
    )


class AnalyticCost:
    """A `CostModel` for a model on a machine, calibrated by the machine's `Rates`."""

    def __init__(
        self,
        shape: ModelShape,
        machine: Machine,
        *,
        max_tp: int | None = None,
        min_tp: int = 1,
        dtype_bytes: int = 2,
        rates: Rates | None = None,
    ) -> None:
        self.machine = machine
        self.geometry = Geometry(shape, max_tp or machine.num_gpus, min_tp)
        self.dtype_bytes = dtype_bytes
        self.rates = rates or rates_for(machine.gpu)
        self._ranks = {d: rank_shape(self.geometry, d, dtype_bytes) for d in self.degrees}
        self._links = {d: all_reduce_curve(self.rates, d) for d in self.degrees if d > 1}
        self._context_prices = {d: self._prices(rank) for d, rank in self._ranks.items()}
        self._dense_s: dict[tuple[int, int, int], float] = {}
        self._body_s: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._head_s: dict[tuple[int, int], float] = {}

    @property
    def degrees(self) -> tuple[int, ...]:
        """Powers of two from min_tp to max_tp."""
        widest = self.geometry.max_tp.bit_length()
        return tuple(1 << b for b in range(self.geometry.min_tp.bit_length() - 1, widest))

    @property
    def memory(self) -> MemoryModel:
        """What KV this geometry leaves room for on this machine."""
        return MemoryModel(self.geometry, self.machine, self.dtype_bytes)

    def kv_tokens(self, degree: int) -> int:
        """Tokens of KV one lane of `degree` holds on ranks of its own."""
        return self.memory.lane_tokens(degree)

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        num_decode, decode_context, prefill, prefill_context, num_samples = batch
        key = (lane.group.degree, num_decode + prefill, num_samples)
        dense_s = self._dense_s.get(key)
        if dense_s is None:
            dense_s = self._remember(key)
        decode_price_s, prefill_price_s = self._context_prices[key[0]]
        return dense_s + decode_context * decode_price_s + prefill_context * prefill_price_s

    def move_time(self, num_bytes: int) -> float:
        return self.rates.move.seconds(num_bytes)

    def offload_time(self, num_bytes: int) -> float:
        return self.rates.offload.seconds(num_bytes)

    def parts(self, degree: int, batch: BatchShape) -> StepParts:
        """The step's time by part; raises `ConfigError` for a degree outside min_tp..max_tp."""
        self._check_degree(degree)
        dense = self._dense_parts(degree, batch.num_tokens, batch.num_samples)
        decode_price_s, prefill_price_s = self._context_prices[degree]
        context_s = batch.decode_context_tokens * decode_price_s
        context_s += batch.prefill_context_tokens * prefill_price_s
        return dense._replace(attention_s=dense.attention_s + context_s)

    def _remember(self, key: tuple[int, int, int]) -> float:
        self._check_degree(key[0])
        if len(self._dense_s) >= _MAX_CACHED:
            self._dense_s.clear()
            self._body_s.clear()
            self._head_s.clear()
        return self._dense_s.setdefault(key, self._dense_parts(*key).total_s)

    def _check_degree(self, degree: int) -> None:
        if degree not in self._ranks:
            raise ConfigError(f"No lane can run at TP{degree}; degrees here: {self.degrees}.")

    def _dense_parts(self, degree: int, num_tokens: int, num_samples: int) -> StepParts:
        """All that depends on token counts only; attention holds its launches."""
        body_s = self._body_s.get((degree, num_tokens))
        if body_s is None:
            body_s = self._body_s[degree, num_tokens] = self._body_times(degree, num_tokens)
        head_s = self._head_s.get((degree, num_samples))
        if head_s is None:
            head_s = self._head_s[degree, num_samples] = self._head_time(degree, num_samples)
        gemm_s, elementwise_s, all_reduce_s = body_s
        launch_s = self.geometry.shape.num_layers * self.rates.attention_launch_s
        return StepParts(gemm_s, head_s, elementwise_s, all_reduce_s, launch_s, self.rates.step_s)

    def _body_times(self, degree: int, num_tokens: int) -> tuple[float, float, float]:
        """GEMMs, elementwise kernels and all-reduces of all layers."""
        rank, rates, layers = self._ranks[degree], self.rates, self.geometry.shape.num_layers
        gemm_s = sum(rates.gemm.seconds(num_tokens, n, k, self.dtype_bytes) for n, k in rank.gemms)
        return (
            layers * gemm_s,
            layers * self._elementwise_time(rank, num_tokens),
            2 * layers * self._all_reduce_time(degree, num_tokens),
        )

    def _head_time(self, degree: int, num_samples: int) -> float:
        """Logits of the sampled rows, gathered from all shards."""
        if num_samples == 0:
            return 0.0
        rank = self._ranks[degree]
        logits_s = self.rates.gemm.seconds(num_samples, *rank.head, self.dtype_bytes)
        if degree == 1:
            return logits_s
        # A gather moves half of what an all-reduce of the result moves.
        num_bytes = num_samples * self.geometry.vocab_size * self.dtype_bytes / 2
        return logits_s + self._links[degree].seconds(num_bytes)

    def _elementwise_time(self, rank: RankShape, num_tokens: int) -> float:
        num_bytes = (2 * rank.norm_bytes, rank.rope_bytes, rank.act_bytes)
        launches = 4 * self.rates.elementwise.launch_s
        return launches + num_tokens * sum(num_bytes) / self.rates.elementwise.bytes_per_s

    def _all_reduce_time(self, degree: int, num_tokens: int) -> float:
        if degree == 1:
            return 0.0
        num_bytes = num_tokens * self.geometry.shape.hidden_size * self.dtype_bytes
        return self._links[degree].seconds(num_bytes)

    def _prices(self, rank: RankShape) -> tuple[float, float]:
        """Seconds per token of decode context, and per unit of prefill context."""
        layers, rates = self.geometry.shape.num_layers, self.rates
        return (
            layers * rank.kv_token_bytes / rates.attention_bytes_per_s,
            layers * rank.attention_flops / rates.attention_flops_per_s,
        )


def step_work(geometry: Geometry, degree: int, batch: BatchShape, dtype_bytes: int = 2) -> StepWork:
    """What one rank has to read (no embedding table) and to compute at least."""
    rank, layers = rank_shape(geometry, degree, dtype_bytes), geometry.shape.num_layers
    rows = sum(n * k for n, k in rank.gemms)
    weights = layers * rows + rank.head[0] * rank.head[1]
    kv_bytes = layers * batch.decode_context_tokens * rank.kv_token_bytes
    flops = 2 * batch.num_tokens * layers * rows
    flops += layers * batch.prefill_context_tokens * rank.attention_flops
    flops += 2 * batch.num_samples * rank.head[0] * rank.head[1]
    return StepWork(weights * dtype_bytes + kv_bytes, flops)
