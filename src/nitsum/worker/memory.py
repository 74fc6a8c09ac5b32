"""What a worker's memory goes to, in bytes; printed at start, so that its cost is no secret."""

from __future__ import annotations

import resource
import sys

from nitsum.messages import WorkerSpec
from nitsum.shape import Geometry
from nitsum.shared import DTYPE_BYTES, comm_layout, row_tokens


def memory_bytes(spec: WorkerSpec, geometry: Geometry, weights_bytes: int) -> dict[str, int]:
    """By what it is for. `comm` counts the buffers of this rank's groups, each shared by its
    members; `peak_rss` is all the process has touched so far, libraries included."""
    unit_bytes = geometry.unit_bytes(spec.block_tokens, DTYPE_BYTES[spec.dtype])
    own_groups = [group for group in spec.groups if spec.rank in group.ranks]
    return {
        "weights": weights_bytes,
        "kv": spec.num_units * unit_bytes,
        "host_kv": spec.num_host_units * unit_bytes,
        "rows": 4 * spec.max_slots * row_tokens(spec),
        "comm": sum(comm_layout(spec, geometry, group).size_bytes for group in own_groups),
        "peak_rss": _peak_rss_bytes(),
    }


def _peak_rss_bytes() -> int:
    """Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
