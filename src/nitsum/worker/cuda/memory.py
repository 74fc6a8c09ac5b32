"""How much of a GPU becomes KV cache. Integers only.

total  [ others | weights | buffers, graphs, workspaces | KV ............ | margin ]
       '----------- in use once all is warm -----------'
"""

from __future__ import annotations

from typing import NamedTuple

from nitsum.errors import ConfigError
from nitsum.shape import Geometry


class DeviceMemory(NamedTuple):
    """Of one GPU, bytes; `num_ranks` share it (one, but for tests)."""

    free_bytes: int
    total_bytes: int
    num_ranks: int = 1


def kv_units(
    memory: DeviceMemory,
    reserved_bytes: int,
    share: float,
    geometry: Geometry,
    unit_bytes: int,
) -> int:
    """Units of one rank's arena, a whole number of blocks at every degree.

    `memory` is read when everything but KV and `reserved_bytes` (what later phases allocate) is
    there. Raises `ConfigError` if nothing fits.
    """
    margin_bytes = round((1.0 - share) * memory.total_bytes)
    room_bytes = memory.free_bytes - margin_bytes
    per_rank = room_bytes // memory.num_ranks - reserved_bytes
    block_units = geometry.num_units
    num_blocks = per_rank // (unit_bytes * block_units)
    if num_blocks < 1:
        raise ConfigError(
            f"No GPU memory is left for KV cache: {memory.free_bytes / 2**30:.1f} GiB of "
            f"{memory.total_bytes / 2**30:.1f} are free before it, {margin_bytes / 2**30:.1f} stay "
            f"free and {reserved_bytes / 2**30:.1f} are needed for graphs and buffers. Use a "
            "smaller model, more GPUs with --min-tp, a lower --max-batch-tokens, or free the GPU."
        )
    return num_blocks * block_units
