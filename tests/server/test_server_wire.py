"""Over a real connection: OpenAI's client, clients that leave, engines that die, draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nitsum.engine.fake_client import FakeEngineClient
from tests.server.server_kit import MODEL, Bench, served

MESSAGES: Any = [{"role": "user", "content": "hi"}]
BODY = {"model": MODEL, "messages": MESSAGES}
Body = Callable[[str], Awaitable[None]]


def run(bench: Bench, body: Body) -> None:
    async def main() -> None:
        async with served(bench) as url:
            await asyncio.wait_for(body(url), 20)

    asyncio.run(main())


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


def slow(checkpoint: Path, **fields: Any) -> Bench:
    """Draws a long answer, a token every 20 ms."""
    bench = Bench(checkpoint, FakeEngineClient(delay_s=0.02), **fields)
    return bench.says("the quick brown fox " * 30)


def test_the_openai_client(checkpoint: Path) -> None:
    bench = Bench(checkpoint, api_key="k").says("Hello 🦊 world")

    async def body(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            await _chat_whole_and_streamed(client)
            await _completion_whole_and_streamed(client)
            await _errors(client)
            assert [m.id async for m in client.models.list()] == [MODEL, "alias"]
            assert (await client.models.retrieve(MODEL)).id == MODEL

    run(bench, body)


async def _chat_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, service_tier="flex", logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "Hello 🦊 world"
    assert answer.service_tier == "flex"
    assert answer.choices[0].logprobs is not None
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options=options
    )
    chunks = [chunk async for chunk in stream]
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == "Hello 🦊 world"
    assert chunks[-1].usage == answer.usage


async def _completion_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="x", logprobs=1)
    assert answer.choices[0].text == "Hello 🦊 world"
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == "Hello 🦊 world"


async def _errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=[], temperature=0)
    assert bad.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_requests(checkpoint: Path, stream: bool, n: int) -> None:
    bench = slow(checkpoint)

    async def body(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            call = http.post("/v1/chat/completions", json={**BODY, "stream": stream, "n": n})
            task = asyncio.create_task(call)
            await until(lambda: len(bench.engine.requests) == n)
            await asyncio.sleep(0.05)
            assert bench.engine.aborted == []
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: len(bench.engine.aborted) == n)
        ids = {request.request_id for request in bench.engine.requests}
        assert set(bench.engine.aborted) == ids

    run(bench, body)


def test_tokens_arrive_as_they_are_drawn(checkpoint: Path) -> None:
    bench = slow(checkpoint)

    async def body(url: str) -> None:
        async with (
            httpx.AsyncClient(base_url=url) as http,
            http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer,
        ):
            lines = answer.aiter_lines()
            assert "assistant" in await anext(lines)
            # The answer goes on for many tokens: the head came before its end.
            assert bench.engine.aborted == []
            assert len((await bench.engine.status()).lanes) == 1
            assert (await bench.engine.status()).num_running == 1
        await until(lambda: bench.engine.aborted)

    run(bench, body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dying_engine_is_an_error_its_clients_see(checkpoint: Path, stream: bool) -> None:
    bench = slow(checkpoint)

    async def body(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            call = http.post("/v1/chat/completions", json={**BODY, "stream": stream})
            task = asyncio.create_task(call)
            await until(lambda: bench.engine.requests)
            await asyncio.sleep(0.05)
            bench.engine.die()
            response = await task
            _check_died(response, stream)
            again = await http.post("/v1/chat/completions", json=BODY)
            assert again.status_code == 503
            assert (await http.get("/health")).status_code == 503
            assert (await http.get("/health/ready")).status_code == 503
            assert "nitsum:engine_up 0.0" in (await http.get("/metrics")).text

    run(bench, body)


def _check_died(response: httpx.Response, stream: bool) -> None:
    if not stream:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "server_is_overloaded"
        return
    events = response.text.strip().split("\n\n")
    assert "delta" in events[0]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "server_is_overloaded"
    assert "[DONE]" not in response.text


def test_openai_client_raises_for_an_error_inside_a_stream(checkpoint: Path) -> None:
    bench = slow(checkpoint)

    async def body(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            stream = await client.chat.completions.create(**BODY, stream=True)
            await anext(stream)
            bench.engine.die()
            with pytest.raises(openai.APIError, match="engine"):
                async for _ in stream:
                    pass

    run(bench, body)


def drained(bench: Bench, drain_s: float, check: Callable[[httpx.Response], None]) -> None:
    """SIGTERM while a stream is open: `check` gets what became of it."""

    async def body(url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            call = http.post("/v1/chat/completions", json={**BODY, "stream": True})
            task = asyncio.create_task(call)
            await until(lambda: bench.engine.requests)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.02)
            late = await http.post("/v1/chat/completions", json=BODY)
            assert late.status_code == 503
            assert (await http.get("/health/ready")).status_code == 503
            check(await task)
        await until(lambda: bench.engine.num_closed >= 2)

    run(bench, body)


def test_sigterm_lets_requests_finish(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nitsum.server.run")

    def check(response: httpx.Response) -> None:
        assert response.text.endswith("data: [DONE]\n\n")

    bench = Bench(checkpoint, FakeEngineClient(delay_s=0.05)).says("the quick brown fox")
    drained(bench, 10.0, check)
    (told,) = [one.message for one in caplog.records if one.name == "nitsum.server.run"]
    assert told.startswith("Shutting down: 1 request(s) have 60 s to finish.")


def test_sigterm_ends_what_takes_too_long_in_an_error(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check(response: httpx.Response) -> None:
        assert '"error"' in response.text.strip().split("\n\n")[-1]

    drained(slow(checkpoint, drain_s=0.2), 0.2, check)
    assert "1 request(s) end unfinished." in [one.message for one in caplog.records]
