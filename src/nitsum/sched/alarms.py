"""Sequences by the time at which something is due for them."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count

from nitsum.sequence import Sequence

SPARE = 64
"""Entries of cancelled alarms that the heap may keep, beside one for each that is set."""


class Alarms:
    """A heap whose entries are cancelled by forgetting them: setting and cancelling are cheap.

    Most requests are served long before anything is due for them. The heap has numbers in place of
    sequences, so that it holds none of them, and is swept when most of its entries are cancelled.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        """(when it is due, number of the entry)"""
        self._sequences: dict[int, Sequence] = {}
        """By number, of entries that count."""
        self._numbers: dict[Sequence, int] = {}
        self._next = count()

    def set(self, sequence: Sequence, at_s: float) -> None:
        """Replaces the sequence's alarm, if it has one."""
        self.cancel(sequence)
        number = self._numbers[sequence] = next(self._next)
        self._sequences[number] = sequence
        heappush(self._heap, (at_s, number))
        if len(self._heap) > 2 * len(self._sequences) + SPARE:
            self._sweep()

    def cancel(self, sequence: Sequence) -> None:
        number = self._numbers.pop(sequence, None)
        if number is not None:
            del self._sequences[number]

    def due(self, now: float) -> Sequence | None:
        """The sequence whose time came first, if it has come; it stays until cancelled."""
        heap = self._heap
        while heap:
            at_s, number = heap[0]
            sequence = self._sequences.get(number)
            if sequence is not None:
                return sequence if at_s <= now else None
            heappop(heap)
        return None

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if entry[1] in self._sequences]
        heapify(self._heap)

    def __len__(self) -> int:
        return len(self._sequences)
