"""Requests that come together do not hold up those that are there."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

from nitsum.server.turnstile import Turnstile


def test_one_request_begins_in_each_round_of_the_event_loop() -> None:
    begun: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["number"])
        await asyncio.sleep(3600)

    async def main() -> list[int]:
        turnstile = Turnstile(app)
        calls = [
            asyncio.create_task(turnstile({"type": "http", "number": i}, _no, _nowhere))
            for i in range(10)
        ]
        seen: list[int] = []
        while len(begun) < 10:
            await asyncio.sleep(0)
            seen.append(len(begun))
        for call in calls:
            call.cancel()
        return seen

    seen = asyncio.run(main())
    assert begun == list(range(10))  # in the order they came
    assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) == 1


def test_a_client_that_leaves_while_it_waits_blocks_nobody() -> None:
    begun: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append(scope["number"])

    async def main() -> None:
        turnstile = Turnstile(app)
        calls = [
            asyncio.create_task(turnstile({"type": "http", "number": i}, _no, _nowhere))
            for i in range(3)
        ]
        await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.wait(calls)

    asyncio.run(main())
    assert begun == [0, 2]


async def _no() -> dict[str, str]:
    raise AssertionError


async def _nowhere(_message: object) -> None:
    raise AssertionError
