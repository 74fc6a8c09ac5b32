"""From a job to an HTTP response, whole or streamed; the endpoints differ in their shapes only."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.errors import ApiError
from nitsum.server.answer import Piece
from nitsum.server.chunks import ChunkShape, ChunkWriter
from nitsum.server.generation import pieces
from nitsum.server.job import Job
from nitsum.server.schema import CommonBody
from nitsum.server.service import Service
from nitsum.server.shapes import Usage
from nitsum.server.sse import DONE, EventStream, error_event, event, until_disconnect


class Shape(ChunkShape, Protocol):
    """How one endpoint writes its answers."""

    def whole(self, job: Job, found: Mapping[int, list[Piece]]) -> msgspec.Struct:
        """The response to a call that does not stream, from the pieces of each choice."""
        ...

    def last_chunk(self, job: Job, usage: Usage) -> msgspec.Struct:
        """The chunk without choices that ends a stream with usage."""
        ...


async def respond(
    request: HttpRequest, service: Service, body: CommonBody, job: Job, shape: Shape
) -> Response:
    """Run the job; a client that goes away ends it.

    A stream's head waits for the first output, so that a refusal has its own status, and headers
    can say where the request runs.
    """
    stream = pieces(service.engine, job, service.metrics, service.books)
    if not body.stream:
        found = await until_disconnect(request.receive, _collect(stream))
        return json_response(shape.whole(job, found), job.headers())
    return EventStream(_events(stream, job, shape, body), job.headers)


def json_response(body: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(body), media_type="application/json", headers=dict(headers or {})
    )


async def _collect(stream: AsyncGenerator[Piece, None]) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    async with aclosing(stream):
        async for piece in stream:
            found.setdefault(piece.index, []).append(piece)
    return found


async def _events(
    stream: AsyncGenerator[Piece, None], job: Job, shape: Shape, body: CommonBody
) -> AsyncGenerator[bytes, None]:
    """Events for the client. Errors before the first output are raised, later ones are events."""
    options = body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    running = with_usage and options is not None and bool(options.continuous_usage_stats)
    writer = ChunkWriter(job, shape, with_usage=with_usage, running=running)
    begun = False
    async with aclosing(stream):
        try:
            async for piece in stream:
                begun = True
                yield writer.write(piece)
        except ApiError as error:
            if not begun:
                raise
            # Without [DONE]: what came so far is not a whole answer.
            yield error_event(error)
            return
    if with_usage:
        yield event(shape.last_chunk(job, job.usage()))
    yield DONE
