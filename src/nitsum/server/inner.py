"""A call to the application from inside: the same routes and books, without a connection."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass
class InnerResponse:
    status: int
    headers: dict[str, str]
    body: bytes


async def call_inside(app: ASGIApp, path: str, body: bytes, known: dict[str, Any]) -> InnerResponse:
    """POST JSON to `path`. `known` is what the frame would else find out: key and batch.

    Cancelling it ends the work as a client does that goes away.
    """
    response = InnerResponse(500, {}, b"")
    received = bytearray()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Future()  # never disconnects
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {
                k.decode("latin-1"): v.decode("latin-1") for k, v in message["headers"]
            }
        else:
            received.extend(message.get("body", b""))

    await app({**_scope(path), **known}, receive, send)
    response.body = bytes(received)
    return response


def _scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
