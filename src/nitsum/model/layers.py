"""Products, norms and activation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_FEW_ROWS = range(3, 16)
"""Below and above, the library's own product of the whole weight is as fast or faster."""
_PART_BYTES = 1 << 19
"""Of the weight, per thread: stays in a core's second-level cache."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, k] @ weight [m, k] transposed, plus bias [m] -> [n, m].

    With a few rows, MKL reorders all of a weight before it multiplies, which costs more than the
    product. Cut into parts, a weight is still in cache then: 8 rows against SmolLM2-135M's weights,
    one thread, float32: 70 ms instead of 110.
    """
    if not (x.is_cpu and x.dtype == torch.float32 and x.shape[0] in _FEW_ROWS):
        return F.linear(x, weight, bias)
    part_bytes = _PART_BYTES * torch.get_num_threads()
    num_rows = max(64, part_bytes // (weight.shape[1] * weight.element_size()) // 64 * 64)
    if num_rows >= weight.shape[0]:
        return F.linear(x, weight, bias)
    out = torch.cat([F.linear(x, part) for part in weight.split(num_rows)], -1)
    return out if bias is None else out.add_(bias)


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
