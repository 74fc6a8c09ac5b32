"""A server under clients that never stop while its layout never rests: does anything break, slowly?

    clients    each sends a completion, checks what comes, sends the next; tiers in turn
    switches   from plan to plan, with hardly a breath between
    memory     of the server and all its processes, every few seconds

A request fails if it ends in an error or without as many tokens as it asked for; it is stuck if
nothing comes for `stall_s`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from statistics import mean, median
from typing import Any

import httpx

from nitsum.bench.server_sent import DONE, events
from nitsum.bench.stages import OnStage

TIERS = ("priority", "default", "batch")
"""Not flex: over capacity it is refused, as it should be."""
SAMPLE_S = 5.0
"""Between two looks at memory and arenas."""


@dataclass(frozen=True)
class Options:
    """How long, and how hard."""

    duration_s: float = 1200.0
    num_clients: int = 24
    longest_prompt: int = 96
    longest_answer: int = 96
    stall_s: float = 120.0
    rest_s: float = 0.2
    """Between two switches."""
    seed: int = 0


@dataclass
class Result:
    num_requests: int = 0
    num_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter[str])
    """Requests that did not end as they should, by what was wrong."""
    num_switches: int = 0
    failed_switches: list[str] = field(default_factory=list[str])
    kv_used: list[float] = field(default_factory=list[float])
    """Mean use of the arenas by requests, sample by sample."""
    memory_bytes: list[float] = field(default_factory=list[float])
    """Resident memory of all processes, sample by sample."""

    @property
    def memory_growth_share(self) -> float:
        """Of the last third of the run over its second third; the first one warms up."""
        third = len(self.memory_bytes) // 3
        if not third:
            return 0.0
        return median(self.memory_bytes[-third:]) / median(self.memory_bytes[third:-third]) - 1.0

    def figures(self) -> dict[str, float]:
        return {
            "soak_failed": self.failed.total() + len(self.failed_switches),
            "soak_stuck": self.failed["stuck"],
            "soak_wrong_count": self.failed["wrong token count"],
            "soak_switches": self.num_switches,
            "soak_requests": self.num_requests,
            "soak_tokens": self.num_tokens,
            "kv_used_mean_share": mean(self.kv_used) if self.kv_used else 0.0,
            "memory_bytes": median(self.memory_bytes) if self.memory_bytes else 0.0,
            "memory_growth_share": self.memory_growth_share,
        }


def open_client(url: str, options: Options) -> httpx.AsyncClient:
    """For `soak`; a stream that is silent for `stall_s` raises `httpx.ReadTimeout`."""
    timeout = httpx.Timeout(30.0, read=options.stall_s)
    return httpx.AsyncClient(base_url=url, timeout=timeout)


async def soak(
    client: httpx.AsyncClient,
    options: Options,
    on_stage: OnStage,
    read_memory: Callable[[], float],
) -> Result:
    """Run it all for `duration_s`, then let the requests that run finish. Closes `client`."""
    async with client as http:
        run = _Soak(http, options, on_stage, read_memory)
        await run.run()
    return run.result


class _Soak:
    def __init__(
        self,
        http: httpx.AsyncClient,
        options: Options,
        on_stage: OnStage,
        read_memory: Callable[[], float],
    ) -> None:
        self.result = Result()
        self._http = http
        self._options = options
        self._on_stage = on_stage
        self._read_memory = read_memory
        self._end_s = time.monotonic() + options.duration_s
        self._numbers = itertools.count()
        self._model = ""

    async def run(self) -> None:
        self._model = (await self._http.get("/v1/models")).json()["data"][0]["id"]
        clients = (self._client() for _ in range(self._options.num_clients))
        await asyncio.gather(self._switch(), self._watch(), *clients)

    @property
    def _goes_on(self) -> bool:
        return time.monotonic() < self._end_s

    # -- clients --

    async def _client(self) -> None:
        while self._goes_on:
            number = next(self._numbers)
            body = make_body(self._options, number, self._model)
            wrong = await self._complete(body)
            self.result.num_requests += 1
            if wrong:
                self.result.failed[wrong] += 1

    async def _complete(self, body: dict[str, Any]) -> str:
        """Send it, read it to the end; what was wrong, or nothing."""
        num_tokens, reason = 0, None
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.is_error:
                    return f"status {answer.status_code}"
                async for data in events(answer):
                    if data == DONE:
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        return f"error {chunk['error'].get('code')}"
                    for choice in chunk["choices"]:
                        num_tokens += len(choice.get("token_ids") or ())
                        reason = choice["finish_reason"] or reason
        except httpx.ReadTimeout:
            return "stuck"
        except httpx.HTTPError as error:
            return type(error).__name__
        self.result.num_tokens += num_tokens
        is_whole = num_tokens == body["max_tokens"] and reason == "length"
        return "" if is_whole else "wrong token count"

    # -- switches --

    async def _switch(self) -> None:
        status = (await self._http.get("/admin/plans")).json()
        for plan in itertools.cycle([*status["plans"][1:], status["plans"][0]]):
            if not self._goes_on:
                return
            answer = await self._http.post("/admin/plans/switch", json={"plan": plan}, timeout=600)
            self.result.num_switches += 1
            if answer.is_error:
                self.result.failed_switches.append(f"{plan}: {answer.text}")
            await asyncio.sleep(self._options.rest_s)

    # -- watching --

    async def _watch(self) -> None:
        started_s = time.monotonic()
        while self._goes_on:
            await asyncio.sleep(min(SAMPLE_S, max(0.1, self._end_s - time.monotonic())))
            with suppress(httpx.HTTPError):
                ranks = (await self._http.get("/admin/state")).json()["ranks"]
                self.result.kv_used.append(mean(rank["kv_used"] for rank in ranks))
            self.result.memory_bytes.append(self._read_memory())
            done_s = min(self._options.duration_s, time.monotonic() - started_s)
            title = f"{self.result.num_switches} switches, {self.result.failed.total()} failed"
            self._on_stage(title, round(done_s), round(self._options.duration_s))


def make_body(options: Options, number: int, model: str) -> dict[str, Any]:
    """Request `number`: random tokens, half of them behind one of four common prefixes, a third of
    the longest prompt."""
    random = Random(f"{options.seed} {number}")
    prefix = [17 + number % 4] * (options.longest_prompt // 3) if random.random() < 0.5 else []
    own = random.choices(range(3, 200), k=random.randint(1, options.longest_prompt - len(prefix)))
    return {
        "model": model,
        "prompt": prefix + own,
        "max_tokens": random.randint(1, options.longest_answer),
        "service_tier": TIERS[number % len(TIERS)],
        "temperature": 1.0,
        "seed": number,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
