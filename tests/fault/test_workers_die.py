"""Workers that are killed under load: nobody notices but by a pause."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fault.running import RunningServer, is_gone
from tests.fault.streams import Stream, assert_same, run_streams, until

pytestmark = pytest.mark.fault

NUM_STREAMS = 10
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")
    flags = ("--ranks", "2", "--kv-memory", "32MiB", "--log-format", "json")
    with RunningServer(checkpoint, folder, *flags) as running:
        yield running


def test_streams_survive_workers_killed_twice_and_switches(server: RunningServer) -> None:
    reference = run_streams(server.url, NUM_STREAMS, NUM_TOKENS)
    assert all(stream.done and stream.finish_reason == "length" for stream in reference)
    old = server.workers()

    async def meanwhile(http: httpx.AsyncClient, streams: list[Stream]) -> None:
        await until(lambda: all(len(stream.tokens) > 20 for stream in streams))
        old[1].kill()
        await until(lambda: all(is_gone(worker) for worker in old))
        seen = [len(stream.tokens) for stream in streams]
        await until(lambda: all(len(s.tokens) > n for s, n in zip(streams, seen, strict=True)))
        # The switch may take until the streams end: the second kill does not wait for it.
        switch = asyncio.create_task(http.post("/admin/plans/switch", json={"plan": "TP2"}))
        await asyncio.to_thread(server.workers()[0].kill)
        await switch

    disturbed = run_streams(server.url, NUM_STREAMS, NUM_TOKENS, meanwhile)
    assert all(stream.done and stream.error is None for stream in disturbed)
    for got, expected in zip(disturbed, reference, strict=True):
        assert_same(got, expected)
    restarts = [json.loads(line) for line in server.lines if "Workers restarted in" in line]
    assert len(restarts) == 2
    assert all(restart["restart_s"] > 0 for restart in restarts)
    print("\n".join(restart["message"] for restart in restarts))
    _nothing_is_left(server)


def _nothing_is_left(server: RunningServer) -> None:
    """No KV, no request, no process of a generation before."""
    state = server.state()
    assert state["num_restarts"] == 2
    assert state["num_open"] == 0
    assert [rank["kv_used"] for rank in state["ranks"]] == [0.0, 0.0]
    assert len(server.workers()) == 2
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "nitsum:worker_restarts_total 2.0" in metrics
    assert f"nitsum:replayed_requests_total {2 * NUM_STREAMS}.0" in metrics


def test_a_client_that_vanishes_frees_its_kv_at_once(server: RunningServer) -> None:
    async def main() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            request = {"prompt": "x " * 50, "max_tokens": 900, "ignore_eos": True, "stream": True}
            async with http.stream("POST", "/v1/completions", json=request) as answer:
                await anext(answer.aiter_lines())
                used = (await http.get("/load")).json()
                assert used["num_running"] == 1
                assert max(used["kv_used"]) > 0
        left_s = time.monotonic()
        async with httpx.AsyncClient(base_url=server.url) as http:
            while max((await http.get("/load")).json()["kv_used"]):
                assert time.monotonic() - left_s < 5, "the KV of a lost client is still held"
            assert (await http.get("/load")).json()["num_running"] == 0
        return time.monotonic() - left_s

    print(f"KV free {1000 * asyncio.run(main()):.0f} ms after the client left")


def test_every_request_has_a_line_in_the_log(server: RunningServer) -> None:
    headers = {"x-request-id": "mine-1"}
    request = {"prompt": "hello", "max_tokens": 5, "service_tier": "flex", "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=request, headers=headers).raise_for_status()
    line = json.loads(server.wait_line("mine-1"))
    assert line["message"] == "POST /v1/completions 200"
    assert (line["request_id"], line["tier"], line["num_output"]) == ("mine-1", "flex", 5)
    assert line["outcome"] == "ok"
    assert not any('"/health"' in other for other in server.lines)


def test_health_fails_while_the_engine_is_stuck(server: RunningServer) -> None:
    engine = server.engine()
    assert httpx.get(f"{server.url}/health").status_code == 200
    engine.suspend()
    try:
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 503
    finally:
        engine.resume()
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def test_health_fails_while_workers_are_stuck(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--ranks", "1", "--stall-timeout", "1", "--kv-memory", "32MiB")
    with RunningServer(checkpoint, tmp_path, *flags) as server:
        (worker,) = server.workers()
        worker.suspend()
        asyncio.run(_stalls(server, worker))


async def _stalls(server: RunningServer, worker: psutil.Process) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        request = {"prompt": "hello", "max_tokens": 5, "ignore_eos": True}
        waiting = asyncio.create_task(http.post("/v1/completions", json=request))
        async with asyncio.timeout(20):
            while (await http.get("/health")).status_code == 200:
                await asyncio.sleep(0.1)
        assert "no step has completed" in (await http.get("/health")).text
        worker.resume()
        assert (await waiting).status_code == 200
        assert (await http.get("/health")).status_code == 200
