"""The weights one rank works with at one degree: views of its resident tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerWeights:
    """One layer's shard. G KV heads and g query heads a KV head on this rank, d = head_dim.

    Rows of `qkv` are, per KV head, `[g query heads, k, v]`. Where the geometry `splits_kv`, `qkv`
    holds the query rows alone and `kv` the rest, per KV head `[k, v]`.
    """

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [G * (g + 2) * d, hidden], or [G * g * d, hidden]
    qkv_bias: torch.Tensor | None  # as many as `qkv` has rows
    kv: torch.Tensor | None  # [G * 2 * d, hidden]
    kv_bias: torch.Tensor | None  # [G * 2 * d]
    q_norm: torch.Tensor | None  # [d]
    k_norm: torch.Tensor | None  # [d]
    o: torch.Tensor  # [hidden, G * g * d], columns of a wider tensor
    o_bias: torch.Tensor | None  # [hidden], the same on every rank: added by shard 0 only
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [chunks * 2 * width, hidden], per chunk `[gate, up]`
    gate_up_bias: torch.Tensor | None  # [chunks * 2 * width]
    down: torch.Tensor  # [hidden, chunks * width], columns of a wider tensor
    down_bias: torch.Tensor | None  # [hidden], added by shard 0 only


@dataclass(frozen=True)
class ModelWeights:
    """All of a rank's weights for one degree and shard.

    `embedding` holds vocabulary rows `first_token ..`; a rank that holds the whole vocabulary keeps
    it whole at every degree, since a lookup then needs no other rank.
    """

    degree: int
    shard: int
    embedding: torch.Tensor  # [rows, hidden]
    first_token: int
    holds_all_tokens: bool
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [padded vocabulary / degree, hidden]
