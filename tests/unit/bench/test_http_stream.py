"""The load client's HTTP against a server that sends what a test says, cut as it likes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.bench.http_stream import ConnectionBroken, Pool, parse_head

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
COUNTED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n"


class Server:
    """Answers each request with the next of `answers`, a list of pieces; None closes."""

    def __init__(self, answers: list[list[bytes | None]]) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.num_connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        while self.answers and (head := await self._request(reader)):
            self.requests.append(head)
            for piece in self.answers.pop(0):
                if piece is None:
                    writer.close()
                    return
                writer.write(piece)
                await asyncio.sleep(0)
        writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        return head + await reader.readexactly(length)


def run(server: Server, body: Callable[[Pool], Awaitable[None]]) -> None:
    async def main() -> None:
        listener = await asyncio.start_server(server, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/base/")
        try:
            await asyncio.wait_for(body(pool), 10)
        finally:
            pool.close()
            listener.close()

    asyncio.run(main())


async def call(pool: Pool, body: bytes = b"{}") -> tuple[int, bytes]:
    async with pool.post("/v1/x", body, {"a": "b"}) as (status, connection):
        content = b""
        while (data := await connection.body()) is not None:
            content += data
        return status, content


def framed(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@settings(max_examples=40)
@given(
    parts=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_a_body_is_whole_however_it_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    sent = CHUNKED + framed(parts)
    places = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
    pieces = [sent[a:b] for a, b in pairwise(places)]
    server = Server([[*pieces], [COUNTED, b"12345"]])

    async def body(pool: Pool) -> None:
        assert await call(pool) == (200, b"".join(parts))
        # And the next answer begins where this one ended.
        assert await call(pool) == (404, b"12345")
        assert server.num_connections == 1

    run(server, body)


def test_what_is_sent() -> None:
    server = Server([[COUNTED, b"12345"]])

    async def body(pool: Pool) -> None:
        await call(pool, b'{"x": 1}')
        (request,) = server.requests
        head, _, content = request.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"POST /base/v1/x HTTP/1.1"
        assert lines[1].startswith(b"Host: 127.0.0.1:")
        assert lines[2:] == [b"Content-Length: 8", b"a: b"]
        assert content == b'{"x": 1}'

    run(server, body)


def test_pieces_come_as_they_arrive() -> None:
    server = Server([[CHUNKED, b"3\r\nabc\r\n"]])

    async def body(pool: Pool) -> None:
        async with pool.post("/", b"", {}) as (status, connection):
            assert status == 200
            assert await connection.body() == b"abc"  # the end is not here, and never will be

    run(server, body)


@pytest.mark.parametrize(
    "answer",
    [
        [CHUNKED, b"5\r\nabc", None],
        [CHUNKED, b"5\r\nabcde\r\n", None],
        [CHUNKED, b"zz\r\nabc\r\n"],
        [b"SSH-2.0-OpenSSH\r\n\r\n"],
        [b"HTTP/1.1 200", None],
        [COUNTED, b"1", None],
        [None],
    ],
)
def test_half_an_answer_is_an_error(answer: list[bytes | None]) -> None:
    server = Server([answer, [COUNTED, b"12345"]])

    async def body(pool: Pool) -> None:
        with pytest.raises(ConnectionBroken):
            await call(pool)
        assert (await call(pool))[0] == 404, "the next call has a connection of its own"
        assert server.num_connections == 2

    run(server, body)


def test_a_connection_that_the_server_ends_is_not_used_again() -> None:
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab"
    server = Server([[closing], [COUNTED, b"12345"]])

    async def body(pool: Pool) -> None:
        assert await call(pool) == (200, b"ab")
        assert (await call(pool))[0] == 404
        assert server.num_connections == 2

    run(server, body)


def test_leaving_early_closes_the_connection() -> None:
    server = Server([[CHUNKED, b"3\r\nabc\r\n"], [COUNTED, b"12345"]])

    async def body(pool: Pool) -> None:
        async with pool.post("/", b"", {}):
            pass
        assert (await call(pool))[0] == 404
        assert server.num_connections == 2

    run(server, body)


def test_heads() -> None:
    assert parse_head(["HTTP/1.0 200 OK", "Content-Length: 3"]).keeps is False
    assert parse_head(["HTTP/1.1 503 No", "transfer-encoding: Chunked"]).length is None
    with pytest.raises(ConnectionBroken):
        parse_head(["HTTP/1.1 200 OK", "Content-Length: many"])
    with pytest.raises(ValueError, match="no http"):
        Pool("ftp://host")
