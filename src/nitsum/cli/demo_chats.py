"""Clients that chat without end, each request in another tier."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import httpx
from rich.console import Console

from nitsum.bench.server_sent import DONE, events
from nitsum.errors import NitsumError

TIERS = ("priority", "default", "flex")
QUESTIONS = (
    ("What is the capital of France?", 24),
    ("Name three rivers of Europe.", 60),
    ("Write a short story about a lighthouse keeper and a storm.", 160),
    ("Why is the sky blue?", 80),
    ("Give me a recipe for pancakes, step by step.", 160),
    ("Translate to French: good morning.", 24),
    ("Explain to a child what a computer does.", 120),
)


class Chats:
    """Runs clients against one server; leave the context to let them finish."""

    def __init__(self, url: str, console: Console, num_clients: int) -> None:
        self._console = console
        self._num_clients = num_clients
        self._http = httpx.AsyncClient(base_url=url, timeout=600)
        self._work = itertools.cycle(
            (tier, *question) for question, tier in zip(QUESTIONS * 3, TIERS * 7, strict=True)
        )
        self._streaming: set[int] = set()
        self._ids = itertools.count()
        self._num_tokens = 0
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._model = ""

    async def __aenter__(self) -> Self:
        models = (await self._http.get("/v1/models")).json()
        self._model = models["data"][0]["id"]
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._num_clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await self._http.aclose()

    # -- what the walk needs --

    async def plans(self) -> dict[str, Any]:
        return (await self._http.get("/admin/plans")).json()

    async def switch(self, plan: str) -> dict[str, Any]:
        """Change the layout; the server's report."""
        answer = await self._http.post("/admin/plans/switch", json={"plan": plan})
        if answer.is_error:
            raise NitsumError(answer.json()["error"]["message"])
        return answer.json()

    async def until_streams(self, num_streams: int, num_tokens: int) -> None:
        """Until that many chats stream at once and have shown `num_tokens` more tokens."""
        goal = self._num_tokens + num_tokens
        while self._num_tokens < goal or len(self._streaming) < num_streams:
            self._raise_if_failed()
            await asyncio.sleep(0.05)

    def _raise_if_failed(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    # -- one client --

    async def _client(self) -> None:
        while not self._stopping:
            await self._chat(*next(self._work))

    async def _chat(self, tier: str, question: str, max_tokens: int) -> None:
        number, started_s, first_s = next(self._ids), time.monotonic(), 0.0
        text: list[str] = []
        async for piece in self._stream(tier, question, max_tokens):
            if not text:
                first_s = time.monotonic() - started_s
                self._streaming.add(number)
            text.append(piece)
            self._num_tokens += 1
        self._streaming.discard(number)
        took_s = time.monotonic() - started_s
        answer = " ".join("".join(text).split())
        self._console.print(
            f"[bold]{tier:8}[/] {question}\n         [dim]{_shortened(answer)}[/]\n"
            f"         first token after {first_s:.2f} s, {len(text)} pieces in {took_s:.1f} s"
        )

    async def _stream(self, tier: str, question: str, max_tokens: int) -> AsyncIterator[str]:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "service_tier": tier,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.is_error:
                raise NitsumError((await answer.aread()).decode())
            async for data in events(answer):
                if data != DONE:
                    for piece in _pieces(json.loads(data)):
                        yield piece


def _pieces(chunk: dict[str, Any]) -> list[str]:
    if "error" in chunk:
        raise NitsumError(chunk["error"]["message"])
    found = [choice["delta"].get("content") for choice in chunk["choices"]]
    return [piece for piece in found if piece]


def _shortened(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0]} ..."
