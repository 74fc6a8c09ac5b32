"""The end of a server: one signal drains, a second one forces, a deadline holds."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fault.running import RunningServer, is_gone
from tests.fault.streams import Stream, body, run_stream, until

pytestmark = pytest.mark.fault

FLAGS = ("--ranks", "1", "--kv-memory", "32MiB")


def ends(
    server: RunningServer, *, num_tokens: int, signals: int, is_slow: bool = False
) -> tuple[Stream, float]:
    """Send signals while an answer streams; the answer, and how long the end took, seconds. With
    `is_slow`, the end takes long enough to see that new work is refused meanwhile."""

    async def main() -> tuple[Stream, float]:
        stream = Stream()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            task = asyncio.create_task(run_stream(http, body(0, num_tokens), stream))
            await until(lambda: len(stream.tokens) > 5)
            signalled_s = time.monotonic()
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.05)  # answers take ten times as long
            if is_slow:
                await _refused(server.url)
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(server.process.wait, 60)
        return stream, time.monotonic() - signalled_s

    processes = [server.engine(), *server.workers()]
    stream, seconds = asyncio.run(main())
    assert all(is_gone(process) for process in processes)
    return stream, seconds


async def _refused(url: str) -> None:
    """New work gets a 503 while the old is finished; a server that is gone already, nothing."""
    async with httpx.AsyncClient(base_url=url) as other:
        answer = await other.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "server_is_overloaded"
        assert 0 < int(answer.headers["retry-after"]) < 120
        assert (await other.get("/health/ready")).status_code == 503


def test_one_signal_lets_answers_finish(checkpoint: Path, tmp_path: Path) -> None:
    with RunningServer(checkpoint, tmp_path, *FLAGS, "--shutdown-timeout", "60") as server:
        stream, _ = ends(server, num_tokens=900, signals=1, is_slow=True)
        assert stream.done
        assert len(stream.tokens) == 900
        assert server.stop() == 0


def test_a_signal_to_all_processes_drains_as_well(checkpoint: Path, tmp_path: Path) -> None:
    """As service managers send it: to the engine, the workers and whatever started them, too."""

    async def main(server: RunningServer) -> Stream:
        stream = Stream()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            task = asyncio.create_task(run_stream(http, body(0, 400), stream))
            await until(lambda: len(stream.tokens) > 5)
            top = psutil.Process(server.process.pid)
            for process in [top, *top.children(recursive=True)]:
                process.send_signal(signal.SIGTERM)
            await task
        return stream

    with RunningServer(checkpoint, tmp_path, *FLAGS, "--shutdown-timeout", "60") as server:
        stream = asyncio.run(main(server))
        assert stream.done
        assert len(stream.tokens) == 400
        assert server.process.wait(60) == 0
        assert not any("anew" in line for line in server.lines)


def test_a_second_signal_forces(checkpoint: Path, tmp_path: Path) -> None:
    with RunningServer(checkpoint, tmp_path, *FLAGS, "--shutdown-timeout", "600") as server:
        stream, _ = ends(server, num_tokens=950, signals=2)
        assert not stream.done
        server.stop()


def test_the_deadline_ends_what_is_left_in_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with RunningServer(checkpoint, tmp_path, *FLAGS, "--shutdown-timeout", "0.1") as server:
        stream, _ = ends(server, num_tokens=950, signals=1)
        assert not stream.done
        assert stream.error is not None
        assert stream.error["code"] == "server_is_overloaded"
        server.stop()
