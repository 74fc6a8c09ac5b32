"""When Python looks for garbage, in processes where milliseconds matter.

A full collection walks every block of the KV accounting, or every module of a library: 15 to 25 ms
in the middle of a turn, every few seconds under load. It finds next to nothing, since what requests
leave behind is not cyclic. So the engine leaves it to times without work, and workers, which never
know of such a time, do none.
"""

from __future__ import annotations

import gc

NEVER = 1 << 30
IDLE_EVERY_S = 60.0


def collect_young_only() -> None:
    """From now on only what was made lately is looked through; what is here now never."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)


class IdleCollector:
    """Full collections, by whoever has nothing else to do."""

    def __init__(self, now: float) -> None:
        self._last_s = now

    def collect(self, now: float) -> None:
        """Nobody waits: collect, if the last time is long ago."""
        if now - self._last_s >= IDLE_EVERY_S:
            gc.collect()
            self._last_s = now
