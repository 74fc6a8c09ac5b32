"""RMSNorm, alone and fused with the residual addition before it. One program a row.

Rounding follows the reference: the sum is rounded before it is normed, the normed value before it
is scaled.
"""

import torch

from nitsum.kernels.language import jit, next_power_of_2, tl


@jit
def _norm_row(x, weight, out, cols, inside, size, eps):
    mean = tl.sum(x * x, 0) / size
    dtype = out.dtype.element_ty
    normed = (x * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cols, (normed * scale).to(dtype), mask=inside)


@jit
def _rms_norm(x, weight, out, x_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    values = tl.load(x + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    _norm_row(values, weight, out + row * size, cols, inside, size, eps)


@jit
def _add_rms_norm(x, residual, weight, out, x_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    added = tl.load(x + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + row * size + cols, mask=inside, other=0.0).to(tl.float32)
    total = (before + added).to(residual.dtype.element_ty)
    tl.store(residual + row * size + cols, total, mask=inside)
    _norm_row(total.to(tl.float32), weight, out + row * size, cols, inside, size, eps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, k] (rows may be apart) normed over k in float32, times weight [k]; out [n, k]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    n, size = x.shape
    block = next_power_of_2(size)
    if n:
        _rms_norm[(n,)](
            x, weight, out, x.stride(0), size, eps, BLOCK=block, num_warps=num_warps(block)
        )
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual += x` in place, then its norm times weight [k]; all [n, k]. `out` may be `x`."""
    assert residual.is_contiguous()
    out = torch.empty_like(residual) if out is None else out
    n, size = x.shape
    block = next_power_of_2(size)
    if n:
        _add_rms_norm[(n,)](
            x, residual, weight, out, x.stride(0), size, eps, BLOCK=block,
            num_warps=num_warps(block),
        )  # fmt: skip
    return out


def num_warps(block: int) -> int:
    """16 bytes of a 2-byte type for each thread, within what a program may have."""
    return min(16, max(1, block // 256))
