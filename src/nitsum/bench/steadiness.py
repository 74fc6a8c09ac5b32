"""How steadily the machine computes: one piece of Python, timed over and over beside a benchmark.

A shared or virtual machine takes several times as long for the same work now and then, for some
milliseconds. A pause that falls into them is not the engine's, and only a process that does nothing
else can tell.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
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
    """Time pieces of work in another process while the block runs. Should that process die, there
    are no figures."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_time_pieces, args=(there,), daemon=True)
    process.start()
    there.close()
    found = Steadiness()
    try:
        _received(here)  # it is ready
        yield found
    finally:
        with suppress(OSError):
            here.send(None)
        found.pieces_s = summarise(_received(here) or ())
        here.close()
        process.join()


def _received(here: Connection) -> list[float] | None:
    """None where the other side is gone."""
    try:
        return here.recv()
    except (EOFError, OSError):
        return None


def _time_pieces(stop: Connection) -> None:
    """Until told to stop, and one piece at least."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group
    stop.send([])
    times = [_piece_s()]
    while not stop.poll(PERIOD_S):
        times.append(_piece_s())
    stop.send(times)


def _piece_s() -> float:
    started_s = time.perf_counter()
    total = 0
    for number in range(NUM_ADDITIONS):
        total += number
    return time.perf_counter() - started_s
