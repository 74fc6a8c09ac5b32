"""When Python looks for garbage, in processes where milliseconds matter.

A full collection walks every block of the KV accounting, or every module of a library: 15 to 25 ms
in the middle of a turn, every few seconds under load. The young ones are no better while a plan is
switched: its copies make tens of thousands of lists in a few turns, and one collection took 34 ms.
They find nothing, since what requests and switches leave behind is not cyclic (a test says so). So
the engine leaves all of them to times without work. Workers never know of such a time: they collect
what is young, and nothing else.
"""

from __future__ import annotations

import gc

NEVER = 1 << 30
IDLE_EVERY_S = 60.0


def set_aside() -> None:
    """What is here now is never looked through again."""
    gc.collect()
    gc.freeze()


def collect_young_only() -> None:
    """From now on only what was made lately is looked through; what is here now never."""
    set_aside()
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)


def collect_when_told() -> None:
    """From now on nothing is looked through unless `IdleCollector` does it."""
    set_aside()
    gc.disable()


def collect_unless_python_does() -> None:
    """Everything, what was here at the start too: a generation of workers and its accounting are
    gone, which is the one thing that leaves cycles behind, and nobody steps meanwhile. Nothing
    where Python still looks by itself: it finds them in its own time."""
    if gc.isenabled():
        return
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_frozen:
        gc.freeze()


def collect_as_usual() -> None:
    """Take back what `collect_when_told` said."""
    gc.unfreeze()
    gc.enable()


class IdleCollector:
    """Full collections, by whoever has nothing else to do."""

    def __init__(self, now: float) -> None:
        self._last_s = now

    def collect(self, now: float) -> None:
        """Nobody waits: collect, if the last time is long ago."""
        if now - self._last_s >= IDLE_EVERY_S:
            gc.collect()
            self._last_s = now
