"""Server-sent events of a streamed answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

DONE = "[DONE]"
"""The data of the last event of a stream that is whole."""


async def events(answer: httpx.Response) -> AsyncIterator[str]:
    """The data of each event, `DONE` included.

    Only line feeds end a line: `Response.aiter_lines` would also cut texts at characters such as
    U+0085 and U+2028, which JSON need not escape.
    """
    rest = b""
    async for data in answer.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode()
