"""How much KV fits: weights, arena and tokens per rank, lane and plan."""

from __future__ import annotations

from dataclasses import dataclass

from nitsum.cost.machines import Machine
from nitsum.errors import ConfigError
from nitsum.plan import Plan
from nitsum.shape import Geometry, ModelShape


def weight_bytes(geometry: Geometry, dtype_bytes: int = 2) -> int:
    """Bytes of weights a rank keeps: 1/min_tp of the padded matrices, embedding included."""
    shape = geometry.shape
    heads = geometry.num_kv_heads * (2 * geometry.q_per_kv + 2)
    layer = shape.hidden_size * (heads * shape.head_dim + 3 * geometry.intermediate_size)
    vocab = geometry.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return (shape.num_layers * layer + vocab) * dtype_bytes // geometry.min_tp


def token_bytes(geometry: Geometry, degree: int, dtype_bytes: int = 2) -> int:
    """KV bytes of one token on one rank of a lane at `degree`."""
    return geometry.units_per_page(degree) * geometry.unit_bytes(1, dtype_bytes)


@dataclass(frozen=True)
class MemoryModel:
    """What is left for KV on each rank of a machine that holds every layout of a geometry."""

    geometry: Geometry
    machine: Machine
    dtype_bytes: int = 2
    memory_share: float = 0.92
    """Of a device's memory that may be used at all."""
    reserve_bytes: int = 2 << 30
    """Activations, communication buffers and graphs of one rank."""

    @property
    def arena_bytes(self) -> int:
        """KV arena of one rank; negative when not even the weights fit."""
        budget = int(self.machine.gpu.memory_bytes * self.memory_share)
        return budget - self.reserve_bytes - weight_bytes(self.geometry, self.dtype_bytes)

    def lane_tokens(self, degree: int) -> int:
        """Tokens of KV a lane of `degree` holds that has its ranks for itself."""
        return max(0, self.arena_bytes) // token_bytes(self.geometry, degree, self.dtype_bytes)

    def plan_tokens(self, plan: Plan) -> int:
        """Tokens a whole plan holds; an overlay is filled by its least replicating lanes.

        A token of a degree-t lane takes its page on t ranks, so ranks contribute independently.
        """
        total = 0.0
        for rank in range(self.machine.num_gpus):
            degrees = [lane.degree for lane in plan.lanes if rank in lane.ranks]
            total += max((self.lane_tokens(degree) / degree for degree in degrees), default=0.0)
        return round(total)

    def fits(self, degree: int, min_tokens: int = 1) -> bool:
        """Whether a lane of `degree` may exist and holds at least `min_tokens` of KV."""
        in_range = self.geometry.min_tp <= degree <= self.geometry.max_tp
        return in_range and self.lane_tokens(degree) >= min_tokens

    def static(self, degree: int) -> MemoryModel:
        """The same machine with one static layout: each rank keeps only its own shard."""
        return MemoryModel(
            Geometry(self.geometry.shape, degree, degree),
            self.machine,
            self.dtype_bytes,
            self.memory_share,
            self.reserve_bytes,
        )

    def redundancy_share(self, degree: int) -> float:
        """KV room of a static layout at `degree` that is lost to keeping 1/min_tp, 0..1."""
        static_tokens = self.static(degree).lane_tokens(degree)
        return 1.0 - self.lane_tokens(degree) / static_tokens if static_tokens else 0.0


def smallest_min_tp(
    shape: ModelShape,
    machine: Machine,
    *,
    dtype_bytes: int = 2,
    min_tokens: int = 1,
    max_tp: int | None = None,
) -> int:
    """The smallest min_tp whose weights leave every lane room for `min_tokens` of KV.

    Raises `ConfigError` when the model does not fit the machine at all.
    """
    widest = max_tp or machine.num_gpus
    min_tp = 1
    while min_tp <= widest:
        memory = MemoryModel(Geometry(shape, widest, min_tp), machine, dtype_bytes)
        if memory.fits(min_tp, min_tokens):
            return min_tp
        min_tp *= 2
    raise ConfigError(
        f"The model does not fit {machine} with {min_tokens} tokens of KV. "
        "Use more or larger GPUs, or a shorter context."
    )
