"""What the engine needs of its workers. The real ones, the simulator's and the fake share this."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from nitsum.messages import FromWorker, Ready, ToWorker


class Executor(Protocol):
    """Carries messages to ranks, in order, and replies back."""

    def start(self) -> list[Ready]:
        """Start (or restart, as a new generation) all workers; returns when all are ready.

        Raises `WorkerDied` with the worker's own words if one cannot start.
        """
        ...

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        """Append `message` to the FIFO of each rank. Never blocks."""
        ...

    def num_sent(self, rank: int) -> int:
        """Messages sent to `rank` in this generation: what `Move.after` refers to."""
        ...

    def poll(self, timeout_s: float) -> list[FromWorker]:
        """Replies that are here, waiting up to `timeout_s` for the first.

        Raises `WorkerDied` when a worker has ended, failed or stopped answering.
        """
        ...

    def close(self) -> None:
        """End all workers; safe to call twice."""
        ...
