"""When Python looks for garbage, in processes where tens of milliseconds matter."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Full collections take tens of milliseconds with a table of blocks for every request, or every
    module of a library, in the middle of a turn, and find nothing: what requests leave behind is
    not cyclic."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 1000)
