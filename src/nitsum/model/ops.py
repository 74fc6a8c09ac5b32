"""The seam between the decoder and a device's kernels.

The decoder owns the order of things and every GEMM; a backend owns what lies between them. It is
one callable that looks at a step once and returns the operations all layers then share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nitsum.model.interface import Comm, KvPages, StepInput
from nitsum.model.views import LayerWeights
from nitsum.shape import Geometry, ModelShape


@dataclass(frozen=True)
class Heads:
    """The attention heads one rank works on at one degree."""

    num_kv: int
    q_per_kv: int
    head_dim: int

    @classmethod
    def of(cls, geometry: Geometry, degree: int, shard: int) -> Heads:
        num_kv = len(geometry.kv_heads(degree, shard))
        return cls(num_kv, geometry.q_heads(degree) // num_kv, geometry.shape.head_dim)


class StepOps(Protocol):
    """What a backend does for one step."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, hidden]"""
        ...

    def reduce_add_rms_norm(
        self, comm: Comm, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """`residual += sum over the lane of part` in place, then its norm; all [n, hidden]."""
        ...

    def split_rope_write(
        self, index: int, layer: LayerWeights, qkv: torch.Tensor, kv: torch.Tensor | None
    ) -> torch.Tensor:
        """From the projections of layer `index` (rows as in `LayerWeights`, biases not yet added).

        Adds biases, normalises and rotates q and k, writes k and v into their pages, and returns
        q [n, num_kv, q_per_kv, head_dim].
        """
        ...

    def attend(self, index: int, q: torch.Tensor) -> torch.Tensor:
        """Causal attention of q over layer `index`'s pages: [n, num_kv * q_per_kv * head_dim]."""
        ...

    def silu_mul(self, gate_up: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """[n, num_chunks * 2 * width] -> [n, num_chunks * width]"""
        ...


class Backend(Protocol):
    """Looks at a step once, before its first layer."""

    def __call__(
        self, shape: ModelShape, heads: Heads, dtype: torch.dtype, kv: KvPages, step: StepInput
    ) -> StepOps: ...
