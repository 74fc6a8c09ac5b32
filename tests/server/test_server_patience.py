"""Clients that stop in the middle of something are cut off; those that wait are not."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from nitsum.engine.fake_client import FakeEngineClient
from tests.server.server_kit import MODEL, Bench, served

PATIENCE_S = 0.3
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


def cut_off_after_s(checkpoint: Path, *parts: bytes, pause_s: float = 0.0) -> float:
    """How long a connection stays open on which these bytes are all that is ever sent."""

    async def main() -> float:
        async with served(Bench(checkpoint, patience_s=PATIENCE_S)) as url:
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            started_s = time.monotonic()
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause_s)
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return time.monotonic() - started_s

    return asyncio.run(main())


@pytest.mark.parametrize(
    "parts",
    [(), (HEAD[:20],), (HEAD,), (HEAD, b'{"prompt"')],
    ids=["nothing", "half a head", "no body", "half a body"],
)
def test_a_request_that_never_comes_is_not_waited_for(
    checkpoint: Path, parts: tuple[bytes, ...]
) -> None:
    assert PATIENCE_S * 0.9 < cut_off_after_s(checkpoint, *parts) < 5


def test_who_goes_on_sending_is_waited_for(checkpoint: Path) -> None:
    parts = [HEAD[i : i + 10] for i in range(0, len(HEAD), 10)]
    seconds = cut_off_after_s(checkpoint, *parts, pause_s=PATIENCE_S / 2)
    assert seconds > len(parts) * PATIENCE_S / 2


def test_a_slow_answer_is_waited_for(checkpoint: Path) -> None:
    engine = FakeEngineClient(delay_s=2 * PATIENCE_S)
    bench = Bench(checkpoint, engine, patience_s=PATIENCE_S).says("x", end=False)
    body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 1}).encode()

    async def main() -> bytes:
        async with served(bench) as url:
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(HEAD.replace(b"100", str(len(body)).encode()) + body)
            line = await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            return line

    assert asyncio.run(main()) == b"HTTP/1.1 200 OK\r\n"


def test_who_never_reads_is_cut_off(checkpoint: Path) -> None:
    bench = Bench(checkpoint, patience_s=PATIENCE_S).says("x" * 900, end=False)
    fields = {"max_tokens": 900, "stream": True, "n": 4, "logprobs": 5}
    body = json.dumps({"model": MODEL, "prompt": "hi", **fields}).encode()

    async def main() -> None:
        async with served(bench) as url:
            host, port = url.removeprefix("http://").split(":")
            client = small_window(host, int(port))
            client.sendall(HEAD.replace(b"100", str(len(body)).encode()) + body)
            metrics = bench.app.state.service.metrics
            async with asyncio.timeout(30):
                while not bench.engine.requests:
                    await asyncio.sleep(0.01)
                while metrics.open:
                    await asyncio.sleep(0.01)
            client.close()

    asyncio.run(main())
    assert len(bench.engine.aborted) == 4


def small_window(host: str, port: int) -> socket.socket:
    """A connection that takes little while nobody reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, port))
    return client
