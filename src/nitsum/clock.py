"""Time as an argument: the same deciding code runs on the wall clock and in the simulator."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary origin; never goes backwards."""
        ...


class MonotonicClock:
    """The machine's monotonic clock; comparable between processes of one host."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance_to(self, at_s: float) -> None:
        """Move to `at_s`; a time in the past is a mistake of the caller."""
        assert at_s >= self._now_s, f"clock moved backwards: {at_s} < {self._now_s}"
        self._now_s = at_s
