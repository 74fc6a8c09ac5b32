"""What a decode step must read at least, and how fast this machine reads."""

from __future__ import annotations

import time
from collections.abc import Callable

from nitsum.shape import ModelShape
from nitsum.shared import DTYPE_BYTES

_BUFFER_BYTES = 256 << 20
"""Far beyond any cache."""
_REPEATS = 6


def memory_bandwidth(num_threads: int) -> float:
    """Bytes/s of CPU memory: the best of some large copies (read and written) and sums (read).

    A copy alone would be no floor: a processor that fetches what it is about to overwrite moves
    half as much again as it counts, so that reading alone is faster.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    src = torch.ones(_BUFFER_BYTES // 4)
    dst = torch.empty_like(src)
    copy_s = min(_seconds(lambda: dst.copy_(src)) for _ in range(_REPEATS))
    read_s = min(_seconds(src.sum) for _ in range(_REPEATS))
    torch.set_num_threads(before)
    return max(2 * _BUFFER_BYTES / copy_s, _BUFFER_BYTES / read_s)


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def weight_bytes(shape: ModelShape, dtype: str) -> int:
    """Read by every step: all matrices; of the embedding only when it is the output matrix too."""
    embedding = 0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size
    return (shape.num_params - embedding) * DTYPE_BYTES[dtype]


def kv_bytes(shape: ModelShape, num_tokens: int, dtype: str) -> int:
    """K and V of so many positions."""
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return per_token * num_tokens * DTYPE_BYTES[dtype]
