"""Sequences by the time at which something is due for them."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from nitsum.request import Sequence


class Alarms:
    """A heap whose entries are cancelled by forgetting them: setting and cancelling are cheap."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._valid: dict[Sequence, int] = {}
        self._ids = count()

    def set(self, sequence: Sequence, at_s: float) -> None:
        """Replaces the sequence's alarm, if it has one."""
        entry_id = next(self._ids)
        self._valid[sequence] = entry_id
        heappush(self._heap, (at_s, entry_id, sequence))

    def cancel(self, sequence: Sequence) -> None:
        self._valid.pop(sequence, None)

    def due(self, now: float) -> Sequence | None:
        """The sequence whose time came first, if it has come; it stays until cancelled."""
        heap = self._heap
        while heap:
            at_s, entry_id, sequence = heap[0]
            if self._valid.get(sequence) == entry_id:
                return sequence if at_s <= now else None
            heappop(heap)
        return None

    def __len__(self) -> int:
        return len(self._valid)
