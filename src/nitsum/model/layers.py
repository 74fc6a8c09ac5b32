"""Norms and activation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., k] divided by its root mean square over k (in float32), times `weight` [k]."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """silu(gate) * up: per chunk [gate, up]: [n, chunks * 2 * width] -> [n, chunks * width]."""
    n = gate_up.shape[0]
    chunks = gate_up.view(n, num_chunks, 2, -1)
    return (F.silu(chunks[:, :, 0]) * chunks[:, :, 1]).view(n, -1)
