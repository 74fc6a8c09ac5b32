"""Products, norms and activation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_THIN_ROWS = range(2, 9)
_FEW_ROWS = range(9, 32)
_PART_ROWS = 192
"""Of a weight, as one product of a batch: 432 KiB of a model 576 wide, which a core's second-level
cache holds. Below 96 and above 384 the whole gets slower."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, k] @ weight [m, k] transposed, plus bias [m] -> [n, m].

    With a few rows, the matrix library reorders all of a weight before it multiplies, which costs
    more than the product. It reads the weight as it lies when the weight comes first, and reorders
    in cache when the weight is cut into a batch. All matrices of SmolLM2-135M, float32, one thread,
    CPU ms:

        rows           1    2    3    4    8   12   16   24   32  128
        x first       50   94  123  115  123  127  151  182  194  640
        weight first  51   59   76   61   99  177  147  206  197  611
        in parts      50   77   92   90   99  106  125  154  171  579
    """
    if x.is_cpu and x.dtype == torch.float32:
        if x.shape[0] in _THIN_ROWS:
            return _biased(torch.mm(weight, x.t()).t().contiguous(), bias)
        if x.shape[0] in _FEW_ROWS and weight.shape[0] % _PART_ROWS == 0:
            return _biased(_linear_in_parts(x, weight), bias)
    return F.linear(x, weight, bias)


def _linear_in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[n, k], [parts * rows, k] -> [n, parts * rows]"""
    parts = weight.unflatten(0, (-1, _PART_ROWS)).transpose(1, 2)  # [parts, k, rows]
    return torch.bmm(x.expand(parts.shape[0], -1, -1), parts).transpose(0, 1).flatten(1)


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x.add_(bias)


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
