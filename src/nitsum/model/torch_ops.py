"""The plain PyTorch backend: what CPUs run, and the reference for kernels."""

from __future__ import annotations

import torch

from nitsum.model import layers
from nitsum.model.attention import PagedAttention, written_rows
from nitsum.model.interface import Comm, KvPages, StepInput
from nitsum.model.ops import Heads
from nitsum.model.rope import rotate, rotation
from nitsum.model.views import LayerWeights
from nitsum.shape import ModelShape


class TorchOps:
    """`StepOps` in PyTorch. Anything the layers share is computed once, here."""

    def __init__(
        self, shape: ModelShape, heads: Heads, dtype: torch.dtype, kv: KvPages, step: StepInput
    ) -> None:
        self._eps = shape.rms_eps
        self._heads = heads
        self._kv = kv
        self._block_tokens = kv.keys(0).shape[2]
        self._cos, self._sin = rotation(shape.rope, shape.head_dim, step.positions, dtype)
        self._rows = written_rows(step.kv_slots, heads.num_kv, self._block_tokens)
        self._attention = PagedAttention(step, heads.num_kv, self._block_tokens, dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return layers.rms_norm(x, weight, self._eps)

    def reduce_add_rms_norm(
        self, comm: Comm, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        summed = comm.all_reduce(part) if comm.degree > 1 else part
        return layers.rms_norm(residual.add_(summed), weight, self._eps)

    def silu_mul(self, gate_up: torch.Tensor, num_chunks: int) -> torch.Tensor:
        return layers.silu_mul(gate_up, num_chunks)

    def split_rope_write(
        self, index: int, layer: LayerWeights, qkv: torch.Tensor, kv: torch.Tensor | None
    ) -> torch.Tensor:
        if kv is None:
            q, k, v = self._rotate_fused(layer, _biased(qkv, layer.qkv_bias))
        else:
            kv = _biased(kv, layer.kv_bias)
            q, k, v = self._rotate_split(layer, _biased(qkv, layer.qkv_bias), kv)
        d = self._heads.head_dim
        self._kv.keys(index).view(-1, d).index_copy_(0, self._rows, k.reshape(-1, d))
        self._kv.values(index).view(-1, d).index_copy_(0, self._rows, v.reshape(-1, d))
        return q

    def attend(self, index: int, q: torch.Tensor) -> torch.Tensor:
        return self._attention(q, self._kv.keys(index), self._kv.values(index))

    def _rotate_fused(self, layer: LayerWeights, qkv: torch.Tensor) -> _Split:
        """q and k are neighbours in a group's rows, so one call rotates both."""
        num_kv, g, d = self._heads.num_kv, self._heads.q_per_kv, self._heads.head_dim
        groups = qkv.view(-1, num_kv, g + 2, d)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._rotated(layers.rms_norm(groups[:, :, :g], layer.q_norm, self._eps))
            k = self._rotated(layers.rms_norm(groups[:, :, g : g + 1], layer.k_norm, self._eps))
            return q, k, groups[:, :, g + 1]
        turned = self._rotated(groups[:, :, : g + 1])
        return turned[:, :, :g], turned[:, :, g], groups[:, :, g + 1]

    def _rotate_split(self, layer: LayerWeights, q: torch.Tensor, kv: torch.Tensor) -> _Split:
        num_kv, g, d = self._heads.num_kv, self._heads.q_per_kv, self._heads.head_dim
        q = q.view(-1, num_kv, g, d)
        pairs = kv.view(-1, num_kv, 2, d)
        k = pairs[:, :, :1]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = layers.rms_norm(q, layer.q_norm, self._eps)
            k = layers.rms_norm(k, layer.k_norm, self._eps)
        return self._rotated(q), self._rotated(k), pairs[:, :, 1]

    def _rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """[n, groups, heads, d] -> the same, rotated."""
        n, groups, num, d = heads.shape
        flat = heads.reshape(n, groups * num, d)
        return rotate(flat, self._cos, self._sin).view(n, groups, num, d)


_Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x.add_(bias)
