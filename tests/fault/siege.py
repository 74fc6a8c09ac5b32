"""Malformed requests by the thousand, while good ones go on."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

import httpx
import psutil

from tests.fault.calls import Answer, Call, ask_all, difference
from tests.fault.leaks import rss_mb
from tests.fault.malformed import Attacker
from tests.fault.running import RunningServer
from tests.fault.trouble import open_client

NUM_AT_A_TIME = 32
WARM_SAMPLE = 5
"""Of 20, after which memory must not grow any more: by then caches are full."""
STEADY_MB = 10.0
"""What it may grow by steadily, sample by sample. A kilobyte or two kept of each of 10,000 requests
would be more."""
GROWTH_MB = 70.0
"""What it may grow by in all: the allocator may keep room for two more of the largest bodies."""


@dataclass
class Siege:
    """What came of it. Memory is resident, in MB."""

    statuses: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    """By kind and status; no status where the connection was closed without one."""
    stuck: list[str] = field(default_factory=list[str])
    wrong: list[str] = field(default_factory=list[str])
    """Good calls with an answer that is not theirs, in words."""
    num_good: int = 0
    calm_s: float = 0.0
    besieged_s: float = 0.0
    """Median time of a good round, before and meanwhile."""
    memory_mb: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """After every twentieth of the requests, and at the end."""
    seconds: float = 0.0

    def server_errors(self) -> Counter[tuple[str, int | None]]:
        return Counter({key: n for key, n in self.statuses.items() if (key[1] or 0) >= 500})

    def growth_mb(self) -> dict[str, float]:
        """From when it was warm to the end."""
        warm, end = self.memory_mb[WARM_SAMPLE], self.memory_mb[-1]
        return {name: end[name] - mb for name, mb in warm.items()}

    def steady_growth_mb(self) -> dict[str, float]:
        """The median step between samples, times the steps: leaks add up, single jumps do not."""
        warm = self.memory_mb[WARM_SAMPLE:]
        found: dict[str, float] = {}
        for name in warm[0]:
            steps = [after[name] - before[name] for before, after in pairwise(warm)]
            found[name] = statistics.median(steps) * len(steps)
        return found

    def grows(self) -> bool:
        steadily = any(growth > STEADY_MB for growth in self.steady_growth_mb().values())
        return steadily or any(growth > GROWTH_MB for growth in self.growth_mb().values())


def besiege(server: RunningServer, calls: list[Call], num_requests: int, seed: int = 0) -> Siege:
    """`calls` again and again, first in peace, then among that many malformed requests."""
    return asyncio.run(_besiege(server, calls, num_requests, seed))


async def _besiege(server: RunningServer, calls: list[Call], num_requests: int, seed: int) -> Siege:
    siege = Siege()
    at = urlsplit(server.url)
    attacker = Attacker(str(at.hostname), int(at.port or 0), seed)
    reference: list[Answer] = []
    async with open_client(server) as http:
        await ask_all(http, calls, reference)
        await attacker.fill()
        siege.calm_s = statistics.median([await _round(http, reference, siege) for _ in range(3)])
        good = asyncio.create_task(_rounds(http, reference, siege))
        started_s = time.monotonic()
        await _attacks(server, attacker, siege, num_requests)
        siege.seconds = time.monotonic() - started_s
        good.cancel()
        siege.besieged_s = statistics.median(await good)
        attacker.close()
        await asyncio.sleep(1.0)
        siege.memory_mb.append(_memory(server))
        await _round(http, reference, siege)
    return siege


async def _attacks(
    server: RunningServer, attacker: Attacker, siege: Siege, num_requests: int
) -> None:
    numbers = iter(range(num_requests))

    async def one_after_another() -> None:
        for number in numbers:
            if number % max(1, num_requests // 20) == 0:
                siege.memory_mb.append(_memory(server))
            try:
                siege.statuses[await attacker.attack()] += 1
            except TimeoutError:
                siege.stuck.append(str(number))

    await asyncio.gather(*(one_after_another() for _ in range(NUM_AT_A_TIME)))


async def _rounds(http: httpx.AsyncClient, reference: list[Answer], siege: Siege) -> list[float]:
    """Until cancelled, which lets the round under way end."""
    times: list[float] = []
    stop = False
    while not stop:
        one = asyncio.ensure_future(_round(http, reference, siege))
        try:
            times.append(await asyncio.shield(one))
        except asyncio.CancelledError:
            times.append(await one)
            stop = True
    return times


async def _round(http: httpx.AsyncClient, reference: list[Answer], siege: Siege) -> float:
    """Ask all good calls again; how long it took, seconds."""
    started_s = time.monotonic()
    answers: list[Answer] = []
    await ask_all(http, [answer.call for answer in reference], answers, num_at_a_time=4)
    for got, expected in zip(answers, reference, strict=True):
        words = difference(got, expected) if got.is_whole else f"not whole: {got.error}"
        if words is not None:
            siege.wrong.append(f"{got.call}: {words}")
    siege.num_good += len(answers)
    return time.monotonic() - started_s


def _memory(server: RunningServer) -> dict[str, float]:
    workers = server.workers()
    return {
        "server": rss_mb(psutil.Process(server.process.pid)),
        "engine": rss_mb(server.engine()),
        "workers": sum(rss_mb(worker) for worker in workers),
    }
