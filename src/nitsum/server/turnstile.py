"""Requests that come together begin one after the other.

Reading a request takes a millisecond: validation, the template, tokens. Thirty that come at once
would keep the event loop from everything else for as long as thirty take, and every stream that is
open would stand still. So one begins, the loop goes round, and the next one begins.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send


class Turnstile:
    """ASGI middleware: lets one request a round of the event loop in, in the order they came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            async with self._turn:
                await asyncio.sleep(0)
        await self._app(scope, receive, send)
