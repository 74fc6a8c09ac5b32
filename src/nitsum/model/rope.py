"""Rotary position embedding: angles, and their application to heads."""

from __future__ import annotations

import math
from functools import cache

import torch

from nitsum.shape import RopeScaling


@cache
def inverse_frequencies(rope: RopeScaling, head_dim: int, device: torch.device) -> torch.Tensor:
    """[head_dim / 2] float32, radians per position, after scaling."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return frequencies / llama3_factors(rope, frequencies)
    return frequencies


def llama3_factors(rope: RopeScaling, frequencies: torch.Tensor) -> torch.Tensor:
    """[head_dim / 2]: by how much each frequency is divided, from 1 (fast) to `factor` (slow).

    Llama 3.1's rule: wavelengths above original / low_freq_factor are stretched by `factor`, those
    below original / high_freq_factor are kept, and between the two the *frequency* is blended.
    """
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    width = rope.high_freq_factor - rope.low_freq_factor
    smooth = ((turns - rope.low_freq_factor) / width).clamp(0, 1)
    return 1.0 / ((1 - smooth) / rope.factor + smooth)


def rotation(
    rope: RopeScaling, head_dim: int, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, signed sin), each [n, 1, head_dim], for `rotate`; positions is [n]."""
    angles = positions.float()[:, None] * inverse_frequencies(rope, head_dim, positions.device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads [n, heads, head_dim] to their positions; dimension i is paired with i + d/2."""
    swapped = torch.cat(x.chunk(2, -1)[::-1], -1)
    return (x * cos).addcmul_(swapped, signed_sin)
