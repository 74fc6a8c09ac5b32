"""HTTP/1.1 as far as a load generator needs it: POST, a status, a body that streams.

A general client costs more per chunk than a server does; this one hands on what the socket
delivered, with little between. Connections are kept and used again.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import SplitResult, urlsplit

# Servers close idle connections after five seconds or more; a call must not meet that moment.
_MAX_IDLE_S = 3.0


class ConnectionBroken(OSError):
    """The server closed in the middle of an answer, or sent what is no HTTP."""


@dataclass(frozen=True)
class Head:
    """The start of an answer; `length` is None for a chunked body."""

    status: int
    length: int | None
    keeps: bool
    """The connection can be used again."""


class Pool:
    """Connections to one server. A fresh one is opened where none is free."""

    def __init__(self, url: str) -> None:
        """`url` names scheme and host; raises `ValueError` for what is neither http nor https."""
        self._url: SplitResult = urlsplit(url)
        self._host = self._url.hostname or ""
        if self._url.scheme not in ("http", "https") or not self._host:
            raise ValueError(f"{url} is no http or https URL.")
        self._context = ssl.create_default_context() if self._url.scheme == "https" else None
        self._free: list[Connection] = []

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[tuple[int, Connection]]:
        """The status, and where the body comes from. Raises `OSError`."""
        message = self._message(path, body, headers)
        connection = self._take() or await self._connect()
        try:
            connection.send(message)
            head = await connection.head()
            yield head.status, connection
        finally:
            if connection.is_done:
                connection.free_since_s = time.monotonic()
                self._free.append(connection)
            else:
                connection.close()

    def _take(self) -> Connection | None:
        oldest_s = time.monotonic() - _MAX_IDLE_S
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed and connection.free_since_s > oldest_s:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        port = self._url.port or (443 if self._context else 80)
        _, connection = await loop.create_connection(
            Connection, self._host, port, ssl=self._context
        )
        return connection

    def _message(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        lines = [
            f"POST {self._url.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {self._url.netloc.rpartition('@')[2]}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()


class Connection(asyncio.Protocol):
    """One connection: bytes as they came, cut into a head and pieces of a body."""

    def __init__(self) -> None:
        self._received = b""
        self._reader: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._head: Head | None = None
        self._left = 0
        """Bytes of the body, or of the chunk and the line end after it, still to come."""
        self._ended = False
        self.is_closed = False
        self.free_since_s = 0.0

    @property
    def is_done(self) -> bool:
        """The answer has come to its end, and the connection can be used for another."""
        return self._ended and not self.is_closed and self._head is not None and self._head.keeps

    # -- what the event loop calls --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, since the transports of other event loops are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -- what the pool calls --

    def send(self, message: bytes) -> None:
        assert self._transport is not None
        self._head, self._left, self._ended = None, 0, False
        self._transport.write(message)

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.close()

    async def head(self) -> Head:
        """Once all of it is here."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            await self._more()
        lines = self._received[:end].decode("latin-1").split("\r\n")
        self._received = self._received[end + 4 :]
        self._head = parse_head(lines)
        self._left = self._head.length or 0
        return self._head

    async def body(self) -> bytes | None:
        """What has come of the body, framing removed; None after its end."""
        assert self._head is not None
        chunked = self._head.length is None
        while not self._ended:
            data = self._take_chunks() if chunked else self._take_counted()
            if data or self._ended:
                return data
            await self._more()
        return None

    async def _more(self) -> None:
        if self.is_closed:
            raise ConnectionBroken("The server closed the connection before its answer's end.")
        self._reader = asyncio.get_running_loop().create_future()
        await self._reader

    def _take_counted(self) -> bytes:
        data, self._received = self._received[: self._left], self._received[self._left :]
        self._left -= len(data)
        self._ended = not self._left
        return data

    def _take_chunks(self) -> bytes:
        """The whole chunks that are here."""
        received, start, found = self._received, 0, list[bytes]()
        while (line_end := received.find(b"\r\n", start)) >= 0:
            size = _chunk_size(received[start:line_end])
            data_end = line_end + 2 + size
            if len(received) < data_end + 2:
                break
            if size:
                found.append(received[line_end + 2 : data_end])
            start = data_end + 2
            if not size:
                self._ended = True
                break
        self._received = received[start:]
        return found[0] if len(found) == 1 else b"".join(found)


def parse_head(lines: list[str]) -> Head:
    """Raises `ConnectionBroken` for what is no HTTP head."""
    version, _, rest = lines[0].partition(" ")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    length = None
    with suppress(ValueError):
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = None if chunked else int(headers.get("content-length", "0"))
        keeps = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        return Head(int(rest[:3]), length, keeps)
    raise ConnectionBroken(f"The server does not speak HTTP: {lines[0][:80]!r}.")


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise ConnectionBroken(f"No size of a chunk: {line[:40]!r}.") from None
