"""How steadily the machine computes: one piece of Python, timed over and over beside a benchmark.

A shared or virtual machine takes several times as long for the same work now and then, for some
milliseconds. A pause that falls into them is not the engine's, and only a process that does nothing
else can tell.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection

from nitsum.metrics.percentiles import Summary, summarise

NUM_ADDITIONS = 3000
"""Of one piece: some 0.1 to 0.3 ms."""
PERIOD_S = 2e-3


@dataclass
class Steadiness:
    """Seconds the same work took; filled when the watch ends."""

    pieces_s: Summary = field(default_factory=lambda: summarise(()))

    def figures(self) -> dict[str, float]:
        """P99 and the longest piece, as multiples of the usual one."""
        usual, p99, longest = self.pieces_s.p50, self.pieces_s.p99, self.pieces_s.max
        if not usual or p99 is None or longest is None:
            return {}
        return {"machine_p99_over_p50": p99 / usual, "machine_max_over_p50": longest / usual}


@contextmanager
def watched() -> Generator[Steadiness]:
    """Time pieces of work in another process until the block ends."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_time_pieces, args=(there,), daemon=True)
    process.start()
    there.close()
    found = Steadiness()
    try:
        yield found
    finally:
        here.send(None)
        found.pieces_s = summarise(here.recv())
        process.join()


def _time_pieces(stop: Connection) -> None:
    times: list[float] = []
    while not stop.poll(PERIOD_S):
        times.append(_piece_s())
    stop.send(times)


def _piece_s() -> float:
    started_s = time.perf_counter()
    total = 0
    for number in range(NUM_ADDITIONS):
        total += number
    return time.perf_counter() - started_s
