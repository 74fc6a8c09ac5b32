"""Server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nitsum.errors import ApiError

ResultT = TypeVar("ResultT")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled the moment the client goes away.

    The request's body must have been read. Raises `ClientGone`.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """For a stream that has begun: the status is gone, so the error is an event."""
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"


class EventStream(Response):
    """Sends events until they end or the client goes away; always closes the generator.

    The head waits for the first event, so that an error before it has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Callable[[], Mapping[str, str]]
    ) -> None:
        """`headers` is asked once there is an event. Empty events are not sent."""
        super().__init__(headers={"cache-control": "no-cache"})
        # Not known before the end.
        del self.headers["content-length"]
        self._events = events
        self._late_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await until_disconnect(receive, self._send(send, direct_send(scope, send)))

    async def _send(self, send: Send, send_body: Send) -> None:
        data = await anext(self._events, b"")
        self.headers.update(self._late_headers())
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if data:
            await send_body({"type": "http.response.body", "body": data, "more_body": True})
        async for data in self._events:
            if data:
                await send_body({"type": "http.response.body", "body": data, "more_body": True})
        await send_body({"type": "http.response.body", "body": b"", "more_body": False})


_DIRECT_SEND = "nitsum.send"


def offer_direct_send(scope: Scope, send: Send) -> None:
    """For the outermost middleware: what is between it and the routes looks at heads only."""
    scope[_DIRECT_SEND] = send


def direct_send(scope: Scope, send: Send) -> Send:
    """Where bodies may go once the head has gone through `send`."""
    return scope.get(_DIRECT_SEND, send)
