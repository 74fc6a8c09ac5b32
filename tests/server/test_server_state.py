"""The state behind dashboards, who may see it, and the metrics that the engine counts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.events import PlanDecided
from nitsum.messages import Decision, Status
from nitsum.server.sampler import Sampler
from nitsum.snapshot import Buckets, Happening, Restart, Tally
from tests.server.server_kit import Bench, served

TALLY = Tally(
    preemptions=[("flex", "priority", 3)],
    promotions=[("batch", 2)],
    refusals=[("flex", "rate_limit_exceeded", 5)],
    num_output_tokens=70,
    num_evicted_blocks=4,
    num_restarts=1,
    num_replayed=6,
    last_restarts=[Restart(2.5, 6)],
    rank_busy_s=[12.5],
    rank_waiting_s=[2.5],
    rank_busy_ratio=[0.75],
    switch_gaps=Buckets([0.1, 0.2], [2, 1, 1], 0.9),
    plan_memory_bytes={"TP1": 1024},
    memory_bytes=[{"weights": 4096}],
    recent=[Happening(90.0, "restart", "Workers restarted.", 2)],
)


DECIDED = PlanDecided(
    at_s=1.0,
    decision=7,
    plan="TP1",
    chosen="TP1",
    reason="nothing to gain",
    trigger="window",
    scores=[],
    load={},
    expected_dwell_s=30.0,
)
DECISION = Decision(DECIDED, "#7: stayed in TP1: nothing to gain.")


class CountingEngine(FakeEngineClient):
    """With a tally in its status."""

    async def status(self, num_decisions: int = 0) -> Status:
        decisions = [DECISION] * num_decisions
        plain = await super().status()
        return msgspec.structs.replace(plain, tally=TALLY, now_s=100.0, decisions=decisions)


def test_the_state_has_everything(checkpoint: Path):
    bench = Bench(checkpoint, CountingEngine(plans=("TP1", "TP2"))).says("Hello world")
    bench.chat(service_tier="flex")
    state = bench.get("/admin/state").json()
    assert (state["plan"], state["plans"], state["engine_up"]) == ("TP1", ["TP1", "TP2"], True)
    assert state["ranks"] == [{"rank": 0, "busy": 0.75, "kv_used": 0.25}]
    tiers = {tier["name"]: tier for tier in state["tiers"]}
    assert (tiers["flex"]["num_ended"], tiers["flex"]["attained"]) == (1, 1.0)
    assert tiers["priority"]["attained"] is None
    assert tiers["priority"]["ttft_target_ms"] == 300
    assert state["decision"] == "#7: stayed in TP1: nothing to gain."
    assert state["news"] == [
        {"ago_s": 10.0, "kind": "restart", "text": "Workers restarted.", "count": 2}
    ]


def test_without_an_engine_it_says_so(checkpoint: Path):
    bench = Bench(checkpoint)
    bench.engine.die()
    state = bench.get("/admin/state").json()
    assert (state["engine_up"], state["lanes"]) == (False, [])


@pytest.mark.parametrize("path", ["/admin/state", "/admin/state/stream"])
def test_strangers_may_see_the_page_and_not_the_state(checkpoint: Path, path: str):
    bench = Bench(checkpoint, admin_key="secret")
    assert bench.get("/", client="10.0.0.9").status_code == 200
    assert bench.get(path, client="10.0.0.9").status_code == 403
    if path == "/admin/state":
        headers = {"authorization": "Bearer secret"}
        assert bench.get(path, client="10.0.0.9", headers=headers).status_code == 200


def test_the_page_may_load_nothing_else(bench: Bench):
    answer = bench.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert policy.count("sha256-") == 2


class RestartingEngine(FakeEngineClient):
    """Its status tells of `restarts`."""

    def __init__(self) -> None:
        super().__init__()
        self.restarts: list[Restart] = []

    async def status(self, num_decisions: int = 0) -> Status:
        tally = msgspec.structs.replace(
            TALLY, num_restarts=len(self.restarts), last_restarts=list(self.restarts)
        )
        return msgspec.structs.replace(await super().status(), tally=tally)


def test_each_restart_has_its_line_in_the_log(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = RestartingEngine()
    sampler = Sampler(Bench(checkpoint, engine).app.state.service)

    def looks() -> list[tuple[str, float]]:
        caplog.clear()
        asyncio.run(sampler.look())
        return [(record.message, vars(record)["restart_s"]) for record in caplog.records]

    assert looks() == []
    engine.restarts += [Restart(0.3, 7), Restart(0.2504, 7)]
    assert looks() == [
        ("Workers restarted in 0.3 s; 7 request(s) go on.", 0.3),
        ("Workers restarted in 0.3 s; 7 request(s) go on.", 0.25),
    ]
    assert looks() == []
    engine.restarts = []  # the engine's process was started anew, and counts from nothing
    assert looks() == []
    engine.restarts.append(Restart(1.0, 1))
    assert looks() == [("Workers restarted in 1.0 s; 1 request(s) go on.", 1.0)]


def test_the_stream_goes_on_and_keeps_a_history(checkpoint: Path):
    bench = Bench(checkpoint, CountingEngine())

    async def main() -> list[dict[str, Any]]:
        async with served(bench) as url, httpx.AsyncClient(base_url=url) as http:
            await asyncio.sleep(0.3)
            async with http.stream("GET", "/admin/state/stream") as answer:
                events = [line async for line in _some(answer.aiter_lines(), 3)]
            return [json.loads(line.removeprefix("data: ")) for line in events]

    first, *rest = asyncio.run(main())
    assert first["history"][0]["lanes"] == [[0, 1, 0]]
    assert [one["history"] for one in rest] == [[], []]
    assert rest[0]["time_s"] < rest[1]["time_s"]


async def _some(lines: Any, count: int) -> Any:
    async for line in lines:
        if line:
            yield line
            count -= 1
        if not count:
            return


EXPECTED = """
nitsum:preemptions_total{by="priority",victim="flex"} 3.0
nitsum:starvation_promotions_total{tier="batch"} 2.0
nitsum:refusals_total{code="rate_limit_exceeded",tier="flex"} 5.0
nitsum:gpu_busy_ratio{rank="0"} 0.75
nitsum:rank_busy_seconds_total{rank="0"} 12.5
nitsum:rank_waiting_seconds_total{rank="0"} 2.5
nitsum:memory_bytes{rank="0",use="weights"} 4096.0
nitsum:worker_restarts_total 1.0
nitsum:replayed_requests_total 6.0
nitsum:worker_restart_seconds 2.5
nitsum:kv_evicted_blocks_total 4.0
nitsum:plan_memory_bytes{plan="TP1"} 1024.0
nitsum:plan_switch_gap_seconds_bucket{le="0.1"} 2.0
nitsum:plan_switch_gap_seconds_bucket{le="0.2"} 3.0
nitsum:plan_switch_gap_seconds_bucket{le="+Inf"} 4.0
nitsum:plan_switch_gap_seconds_sum 0.9
"""


def test_metrics_show_what_the_engine_counts(checkpoint: Path):
    shown = Bench(checkpoint, CountingEngine()).get("/metrics").text.splitlines()
    normal = {_sorted_labels(line) for line in shown}
    assert [line for line in EXPECTED.split("\n") if line and line not in normal] == []


def _sorted_labels(line: str) -> str:
    if "{" not in line:
        return line
    name, rest = line.split("{", 1)
    labels, value = rest.rsplit("}", 1)
    return f"{name}{{{','.join(sorted(labels.split(',')))}}}{value}"
