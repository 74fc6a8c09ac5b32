"""silu(gate) * up over interleaved chunks."""

import torch

from nitsum.kernels.language import cdiv, jit, tl

BLOCK = 1024


@jit
def _silu_mul(gate_up, out, out_size, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < out_size
    # chunk c: gate at 2 c width, up one width behind it
    at = gate_up + row * 2 * out_size + cols + (cols // width) * width
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    # The reference rounds between the two.
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * out_size + cols, (active * up).to(dtype), mask=inside)


def silu_mul(
    gate_up: torch.Tensor, num_chunks: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Per chunk [gate, up]: contiguous [n, chunks * 2 * width] -> [n, chunks * width]."""
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, size) if out is None else out
    if n:
        grid = (n, cdiv(size, BLOCK))
        _silu_mul[grid](gate_up, out, size, size // num_chunks, BLOCK=BLOCK, num_warps=4)
    return out
