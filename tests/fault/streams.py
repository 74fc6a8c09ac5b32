"""Many chats at a time, and what to compare of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

TIE_NATS = 1e-3
"""Where the reference's two best were closer than this, another order of adding may choose the
other one: rounding, not a mistake."""

TIERS = ("priority", "default", "flex", "batch")


@dataclass
class Stream:
    """One answer as its client saw it."""

    status: int = 0
    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Between the two best log-probabilities, nats."""
    finish_reason: str | None = None
    done: bool = False
    error: dict[str, Any] | None = None

    def take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = chunk["error"]
            return
        for choice in chunk["choices"]:
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            for scored in (choice["logprobs"] or {}).get("content") or []:
                self.tokens.append(scored["token"])
                best = sorted((top["logprob"] for top in scored["top_logprobs"]), reverse=True)
                self.margins.append(best[0] - best[1])


def body(index: int, num_tokens: int) -> dict[str, Any]:
    """Greedy, of a known length, each with a prompt of its own."""
    words = f"the quick brown fox number {index} jumps over {index * 7} lazy dogs"
    return {
        "messages": [{"role": "user", "content": words}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 2,
        "service_tier": TIERS[index % len(TIERS)],
    }


async def run_stream(http: httpx.AsyncClient, request: dict[str, Any], into: Stream) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=request) as answer:
        into.status = answer.status_code
        if answer.status_code != 200:
            into.error = json.loads(await answer.aread())["error"]
            return
        async for line in event_lines(answer):
            into.take(line)


async def event_lines(answer: httpx.Response) -> AsyncIterator[str]:
    """`data: ...` of each event. Only line feeds end one: `aiter_lines` would also cut texts at
    characters that Unicode calls line breaks, which JSON leaves as they are."""
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line:
                yield line.decode()


Meanwhile = Callable[[httpx.AsyncClient, list[Stream]], Awaitable[None]]


async def _nothing(http: httpx.AsyncClient, streams: list[Stream]) -> None:
    pass


def run_streams(
    url: str, num_streams: int, num_tokens: int, meanwhile: Meanwhile = _nothing
) -> list[Stream]:
    """That many at a time, while `meanwhile` does something to them."""

    async def main() -> list[Stream]:
        streams = [Stream() for _ in range(num_streams)]
        async with httpx.AsyncClient(base_url=url, timeout=240) as http:
            await asyncio.gather(
                *(run_stream(http, body(i, num_tokens), s) for i, s in enumerate(streams)),
                meanwhile(http, streams),
            )
        return streams

    return asyncio.run(main())


async def until(true: Callable[[], object], timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.01)


def assert_same(got: Stream, reference: Stream) -> None:
    """The same tokens, up to a near-tie of the reference."""
    assert len(got.tokens) == len(reference.tokens)
    for here, there, margin in zip(got.tokens, reference.tokens, reference.margins, strict=True):
        if here != there:
            assert margin < TIE_NATS, (here, there, margin)
            return
