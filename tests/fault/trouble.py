"""Workers are killed and plans switch while calls run: what is left of the answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import psutil

from tests.fault.calls import Answer, Call, ask_all, difference
from tests.fault.running import RunningServer

PROGRESS_S = 0.02


@dataclass(frozen=True)
class Trouble:
    """How much of it. One kill follows another after a few seconds, so that it hits workers that
    have just started, or are about to; the rest comes at random, as the calls make progress."""

    num_kills: int
    num_switches: int
    seed: int = 0


@dataclass
class Outcome:
    """Answers with trouble, beside those without."""

    reference: list[Answer]
    disturbed: list[Answer] = field(default_factory=list[Answer])
    seconds: float = 0.0
    num_kills: int = 0
    num_switches: int = 0

    def wrong(self) -> dict[int, str]:
        """Calls that did not end in the answer they should have, in words."""
        found: dict[int, str] = {}
        for i, (got, expected) in enumerate(zip(self.disturbed, self.reference, strict=True)):
            words = difference(got, expected) if got.is_whole else f"not whole: {got.error}"
            if words is not None:
                found[i] = f"{got.call.path} {got.call.body}: {words}"
        return found


def in_peace(server: RunningServer, calls: list[Call]) -> list[Answer]:
    """The answers of a server that nobody disturbs."""

    async def main() -> list[Answer]:
        answers: list[Answer] = []
        async with open_client(server) as http:
            await ask_all(http, calls, answers)
        return answers

    return asyncio.run(main())


def in_trouble(server: RunningServer, reference: list[Answer], trouble: Trouble) -> Outcome:
    """The same calls while workers die and plans switch."""
    return asyncio.run(_in_trouble(server, Outcome(reference), trouble))


async def _in_trouble(server: RunningServer, outcome: Outcome, trouble: Trouble) -> Outcome:
    total = sum(answer.num_tokens for answer in outcome.reference)
    async with open_client(server) as http:
        tasks = [
            asyncio.create_task(_kills(server, trouble, outcome, total)),
            asyncio.create_task(_switches(http, trouble, outcome, total)),
        ]
        started_s = time.monotonic()
        await ask_all(http, [answer.call for answer in outcome.reference], outcome.disturbed)
        outcome.seconds = time.monotonic() - started_s
        await asyncio.gather(*tasks)
    return outcome


def open_client(server: RunningServer) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits)


async def _kills(server: RunningServer, trouble: Trouble, outcome: Outcome, total: int) -> None:
    draw = random.Random(trouble.seed)
    for number, share in enumerate(_moments(draw, trouble.num_kills)):
        if number == 1:
            await asyncio.sleep(draw.uniform(1.0, 4.0))
        else:
            await _until_progress(outcome, share * total)
        await asyncio.to_thread(kill_one, server, draw)
        outcome.num_kills += 1


def kill_one(server: RunningServer, draw: random.Random) -> None:
    """Kill some worker that runs now, or will in a moment."""
    while True:
        with suppress(psutil.Error, IndexError):  # none there, or just gone
            draw.choice(server.workers()).kill()
            return
        time.sleep(PROGRESS_S)


async def _switches(
    http: httpx.AsyncClient, trouble: Trouble, outcome: Outcome, total: int
) -> None:
    draw = random.Random(trouble.seed + 1)
    known = (await http.get("/admin/plans")).raise_for_status().json()
    plans, current = known["plans"], known["plan"]
    for share in _moments(draw, trouble.num_switches):
        await _until_progress(outcome, share * total)
        current = draw.choice([plan for plan in plans if plan != current])
        await _switch(http, current)
        outcome.num_switches += 1


async def _switch(http: httpx.AsyncClient, plan: str) -> None:
    """Ask until it is done: while workers are started anew, nobody answers."""
    while True:
        done = await http.post("/admin/plans/switch", json={"plan": plan})
        if done.status_code != 503:
            assert done.status_code == 200, done.text
            assert done.json()["ok"], done.text
            return
        await asyncio.sleep(1.0)


def _moments(draw: random.Random, count: int) -> list[float]:
    """Shares of all tokens, at which something happens."""
    return sorted(draw.uniform(0.02, 0.85) for _ in range(count))


async def _until_progress(outcome: Outcome, num_tokens: float) -> None:
    await until_tokens(lambda: outcome.disturbed, num_tokens)


async def until_tokens(answers: Callable[[], list[Answer]], num_tokens: float) -> None:
    while sum(answer.num_tokens for answer in answers()) < num_tokens:
        await asyncio.sleep(PROGRESS_S)
