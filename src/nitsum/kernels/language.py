"""Triton, or one sentence that says how to get it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nitsum.errors import MissingDependency

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise MissingDependency(
        "Triton is not installed: it comes with PyTorch's CUDA build; install nitsum[gpu] on a "
        "Linux machine with an NVIDIA GPU, or serve with --device cpu."
    ) from error

__all__ = ["cdiv", "jit", "next_power_of_2", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; what it returns is launched as `kernel[grid](...)`, which no type describes."""
    return triton.jit(function)


def cdiv(value: int, divisor: int) -> int:
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, and at least 1."""
    return 1 << max(0, value - 1).bit_length()
