"""The backend for NVIDIA GPUs: `StepOps` over our kernels and an attention library.

What a captured graph needs lives outside of it: the caller keeps one `CudaBackend` for each bucket
and degree, whose attention was planned for the step at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nitsum.kernels.activation import silu_mul
from nitsum.kernels.attention import AttentionBackend
from nitsum.kernels.norm import add_rms_norm, rms_norm
from nitsum.kernels.qkv_rope import qkv_rope_write, split_heads
from nitsum.kernels.reduce_norm import ReduceNorm
from nitsum.model.interface import Comm, KvPages, StepInput
from nitsum.model.ops import Heads
from nitsum.model.rope import rotation
from nitsum.model.views import LayerWeights
from nitsum.shape import ModelShape, RopeScaling


def rope_table(
    rope: RopeScaling,
    head_dim: int,
    max_positions: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """[max_positions, 2 (cos, sin), head_dim / 2], rounded to `dtype` as the reference does."""
    positions = torch.arange(max_positions, device=device)
    cos, signed_sin = rotation(rope, head_dim, positions, dtype)
    half = head_dim // 2
    return torch.stack((cos[:, 0, :half], signed_sin[:, 0, half:]), 1).contiguous()


@dataclass(frozen=True)
class CudaBackend:
    """A `Backend`. Of a `StepInput` it reads positions and kv_slots (-1 writes nothing); lengths
    and pages are known to `attention`, whose `plan` must have seen the step."""

    attention: AttentionBackend
    rope: torch.Tensor
    """From `rope_table`, in the model's dtype, for all positions a request may have."""
    reduce_norm: ReduceNorm | None = None
    """Of the lane's group; without it, sums and norms are kernels of their own."""

    def __call__(
        self, shape: ModelShape, heads: Heads, dtype: torch.dtype, kv: KvPages, step: StepInput
    ) -> CudaOps:
        assert self.rope.dtype == dtype, "the rope table is rounded as the model is"
        return CudaOps(self, shape.rms_eps, heads, kv, step)


class CudaOps:
    """`StepOps` for one step."""

    def __init__(
        self, backend: CudaBackend, eps: float, heads: Heads, kv: KvPages, step: StepInput
    ) -> None:
        self._attention = backend.attention
        self._rope = backend.rope
        self._reduce_norm = backend.reduce_norm
        self._eps = eps
        self._heads = heads
        self._kv = kv
        self._positions = step.positions
        self._kv_slots = step.kv_slots

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._eps)

    def reduce_add_rms_norm(
        self, comm: Comm, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        reduce_norm = self._reduce_norm
        if reduce_norm is not None and part.shape[0] <= reduce_norm.capacity:
            return reduce_norm(part, residual, weight, self._eps)
        return add_rms_norm(comm.all_reduce(part), residual, weight, self._eps)

    def split_rope_write(
        self, index: int, layer: LayerWeights, qkv: torch.Tensor, kv: torch.Tensor | None
    ) -> torch.Tensor:
        sizes = (self._heads.num_kv, self._heads.q_per_kv, self._heads.head_dim)
        biases = norms = None
        if layer.qkv_bias is not None:
            biases = split_heads(layer.qkv_bias, layer.kv_bias, *sizes)
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = (layer.q_norm, layer.k_norm)
        return qkv_rope_write(
            *split_heads(qkv, kv, *sizes),
            self._rope,
            self._positions,
            self._kv_slots,
            self._kv.keys(index),
            self._kv.values(index),
            biases,
            norms,
            self._eps,
        )

    def attend(self, index: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        self._attention.run(q, self._kv.keys(index), self._kv.values(index), out)
        return out.flatten(1)

    def silu_mul(self, gate_up: torch.Tensor, num_chunks: int) -> torch.Tensor:
        return silu_mul(gate_up, num_chunks)
