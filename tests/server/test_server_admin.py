"""Health, load, models, tokens, metrics, keys and the admin routes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nitsum import __version__
from nitsum.engine.fake_client import FakeEngineClient
from nitsum.messages import SwitchReport, WaveReport
from nitsum.server.caller import now_s
from nitsum.tier import Tier
from tests.server.server_kit import MODEL, Bench, error_of

PLANS = ("4xTP1", "TP4")


@pytest.fixture
def plans_bench(checkpoint: Path) -> Bench:
    return Bench(checkpoint, FakeEngineClient(plans=PLANS))


def series(bench: Bench) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(bench.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(bench: Bench, name: str, **labels: str) -> float:
    if name.startswith("vllm:"):
        labels["model_name"] = MODEL
    return series(bench)[name, tuple(sorted(labels.items()))]


# --- told without a key -------------------------------------------------------------------------


def test_small_facts(bench: Bench) -> None:
    assert bench.get("/version").json() == {"version": __version__}
    assert bench.get("/load").json()["server_load"] == 0
    assert bench.get("/health").json()["status"] == "ok"
    assert bench.get("/health/ready").status_code == 200
    (first, second) = bench.get("/v1/models").json()["data"]
    assert (first["id"], second["id"]) == (MODEL, "alias")
    assert first["tiers"] == ["priority", "default", "flex", "batch"]
    assert bench.get("/v1/models/alias").json()["id"] == "alias"
    assert bench.get("/v1/models/other/one").status_code == 404


def test_tier_policy(bench: Bench) -> None:
    body = bench.get("/v1/tiers").json()
    tiers = {tier["id"]: tier for tier in body["data"]}
    assert tiers["priority"]["ttft_ms"] == 300
    assert tiers["flex"]["deadline_ms"] == 600_000
    assert body["default"] == "default"


def test_tokenize_and_back(bench: Bench) -> None:
    body = bench.post("/tokenize", {"prompt": "Hello 🦊", "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert bench.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "Hello 🦊"}
    messages = [{"role": "user", "content": "hi"}]
    body = bench.post("/tokenize", {"messages": messages}).json()
    assert bench.codec.decode(body["tokens"]).endswith("<|im_start|>assistant\n")
    assert error_of(bench.post("/tokenize", {}))["param"] == "prompt"
    assert error_of(bench.post("/detokenize", {"tokens": [512]}))["param"] == "tokens"
    assert error_of(bench.post("/detokenize", {}))["param"] == "tokens"


def test_health_fails_when_work_waits_and_nothing_moves(checkpoint: Path) -> None:
    bench = Bench(checkpoint, FakeEngineClient(delay_s=60.0), stall_s=5.0).says("x")

    async def health() -> int:
        return (await bench.acall("GET", "/health")).status_code

    async def main() -> None:
        bench.engine.seconds_since_step = 3600.0
        assert await health() == 200, "idle for an hour is not stuck"
        call = asyncio.create_task(bench.acall("POST", "/v1/completions", {"prompt": "x"}))
        while not bench.engine.requests:
            await asyncio.sleep(0.001)
        assert await health() == 200, "work has only just arrived"
        (watch,) = bench.app.state.service.metrics.open
        watch.request = msgspec.structs.replace(watch.request, arrival_s=now_s() - 10)
        assert await health() == 503
        bench.engine.seconds_since_step = 0.1
        assert await health() == 200, "steps complete, however long the request takes"
        bench.engine.die()
        await call

    asyncio.run(main())


# --- keys ---------------------------------------------------------------------------------------


def test_api_key(checkpoint: Path) -> None:
    bench = Bench(checkpoint, api_key="secret").says("x")
    body = {"prompt": "x"}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        response = bench.post("/v1/completions", body, headers=headers)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert "x-request-id" in response.headers
    assert bench.engine.requests == []
    good = {"authorization": "Bearer secret"}
    assert bench.post("/v1/completions", body, headers=good).status_code == 200
    for open_path in ("/health", "/version", "/metrics", "/health/ready"):
        assert bench.get(open_path).status_code == 200
    assert bench.post("/tokenize", {"prompt": "x"}).status_code == 401


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("::1", {}, 200),
        ("127.0.0.1", {"origin": "http://localhost:8000"}, 200),
        ("10.0.0.5", {}, 403),
        ("10.0.0.5", {"authorization": "Bearer admin"}, 200),
        ("10.0.0.5", {"authorization": "Bearer other"}, 403),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, 403),
        ("127.0.0.1", {"origin": "https://evil.example"}, 403),
        ("127.0.0.1", {"host": "evil.example"}, 403),
    ],
)
def test_who_is_an_admin(
    checkpoint: Path, client: str, headers: dict[str, str], status: int
) -> None:
    bench = Bench(checkpoint, admin_key="admin")
    assert bench.get("/admin/plans", client=client, headers=headers).status_code == status


def test_without_an_admin_key_only_local_callers(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    headers = {"authorization": "Bearer "}
    assert bench.get("/admin/plans", client="10.0.0.5", headers=headers).status_code == 403


def test_keys_are_not_printed(checkpoint: Path) -> None:
    bench = Bench(checkpoint, api_key="secret1", admin_key="secret2")
    assert "secret" not in repr(bench.app.state.service.settings)


# --- plans --------------------------------------------------------------------------------------


def test_plans_and_switch(plans_bench: Bench) -> None:
    bench = plans_bench
    assert bench.get("/admin/plans").json()["plan"] == "4xTP1"
    response = bench.post("/admin/plans/switch", {"plan": "TP4", "op_id": "op-1"})
    assert response.status_code == 200
    assert response.json()["op_id"] == "op-1"
    assert (response.json()["from_plan"], response.json()["to_plan"]) == ("4xTP1", "TP4")
    body = bench.get("/admin/plans").json()
    assert (body["plan"], body["plans"]) == ("TP4", list(PLANS))
    assert body["lanes"][0]["group"] == "TP1@0"
    again = bench.post("/admin/plans/switch", {"plan": "TP4", "op_id": "op-1"})
    assert again.json() == response.json(), "one op_id is one switch"
    other = bench.post("/admin/plans/switch", {"plan": "4xTP1", "op_id": "op-1"})
    assert other.status_code == 409
    assert (error_of(other)["param"], error_of(other)["code"]) == ("op_id", "op_id_in_use")
    assert bench.says("x").chat().headers["x-nitsum-plan"] == "TP4"


def test_switch_refusals(plans_bench: Bench) -> None:
    error = error_of(plans_bench.post("/admin/plans/switch", {"plan": "TP8"}))
    assert error["param"] == "plan"
    assert "4xTP1" in error["message"]
    assert error_of(plans_bench.post("/admin/plans/switch", {}))["param"] == "plan"
    plain = plans_bench.call(
        "POST",
        "/admin/plans/switch",
        content=b'{"plan": "TP4"}',
        headers={"content-type": "text/plain"},
    )
    assert plain.status_code == 415
    assert plans_bench.get("/admin/plans").json()["plan"] == "4xTP1"


def test_a_switch_the_engine_refuses_is_a_409(plans_bench: Bench) -> None:
    async def refuse(op_id: str, plan: str) -> SwitchReport:
        return SwitchReport(op_id, "4xTP1", plan, ok=False, message="another switch is under way")

    plans_bench.engine.switch = refuse  # type: ignore[method-assign]
    response = plans_bench.post("/admin/plans/switch", {"plan": "TP4"})
    assert response.status_code == 409
    assert "under way" in error_of(response)["message"]


def test_drain(bench: Bench) -> None:
    assert bench.post("/admin/drain", None).json() == {"draining": True, "num_open": 0}
    for response in (bench.chat(), bench.complete(), bench.get("/health/ready")):
        assert response.status_code == 503
        assert error_of(response)["code"] == "server_is_overloaded"
        assert int(response.headers["retry-after"]) < 120
    assert bench.get("/health").status_code == 200
    assert asyncio.run(bench.engine.status()).draining


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_of_answers(checkpoint: Path) -> None:
    bench = Bench(checkpoint, FakeEngineClient(num_cached=2)).says("Hello world")
    num_output = len(bench.ids("Hello world")) + 1
    bench.chat(service_tier="priority")
    num_prompt = len(bench.sent.prompt)
    bench.chat(max_tokens=1)
    labels = {"tier_requested": "priority", "tier_served": "priority", "outcome": "ok"}
    assert value(bench, "nitsum:requests_total", **labels) == 1
    assert value(bench, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(bench, "vllm:request_success_total", finished_reason="length") == 1
    assert value(bench, "vllm:prompt_tokens_total") == 2 * num_prompt
    assert value(bench, "vllm:generation_tokens_total") == num_output + 1
    assert value(bench, "vllm:prefix_cache_queries_total") == 2 * num_prompt
    assert value(bench, "vllm:prefix_cache_hits_total") == 4
    assert value(bench, "vllm:time_to_first_token_seconds_count") == 2
    assert value(bench, "vllm:inter_token_latency_seconds_count") == num_output - 1
    assert value(bench, "vllm:e2e_request_latency_seconds_count") == 2
    for phase in ("prefill", "decode", "inference"):
        assert value(bench, f"vllm:request_{phase}_time_seconds_count") == 2
    sums = [
        value(bench, f"vllm:request_{phase}_time_seconds_sum") for phase in ("prefill", "decode")
    ]
    assert min(sums) >= 0
    assert value(bench, "vllm:request_inference_time_seconds_sum") == pytest.approx(sum(sums))
    assert value(bench, "nitsum:tpot_seconds_count", tier="priority") == 1
    assert value(bench, "nitsum:queue_wait_seconds_sum", tier="priority") == pytest.approx(0.002)
    assert value(bench, "nitsum:slo_attained_total", tier="priority") == 1
    assert value(bench, "nitsum:goodput_tokens_total", tier="priority") == num_output


def test_metrics_of_what_missed_its_targets(checkpoint: Path) -> None:
    hasty = Tier("default", 0, ttft_s=1e-9, tpot_s=1e-9)
    bench = Bench(checkpoint, tiers=(hasty,)).says("Hello world")
    bench.chat()
    assert value(bench, "nitsum:slo_missed_total", tier="default") == 1
    assert ("nitsum:slo_attained_total", (("tier", "default"),)) not in series(bench)


def test_metrics_of_downgrades(checkpoint: Path) -> None:
    engine = FakeEngineClient(tier=lambda request: ("default", "over capacity by 17 requests"))
    bench = Bench(checkpoint, engine).says("x")
    bench.chat(service_tier="priority")
    labels = {"tier_requested": "priority", "tier_served": "default", "outcome": "ok"}
    assert value(bench, "nitsum:requests_total", **labels) == 1
    assert value(bench, "nitsum:downgrades_total", reason="over capacity by # requests") == 1


def test_metrics_of_requests_taken_without_a_promise(checkpoint: Path) -> None:
    bench = Bench(checkpoint, FakeEngineClient(late=True)).says("x y z")
    bench.chat(service_tier="priority")
    assert value(bench, "nitsum:late_requests_total", tier="priority") == 1
    assert not any(name == "nitsum:downgrades_total" for name, _ in series(bench))


def test_metrics_of_the_engine_and_its_switches(plans_bench: Bench) -> None:
    bench = plans_bench
    bench.post("/admin/plans/switch", {"plan": "TP4", "op_id": "op-1"})
    bench.post("/admin/plans/switch", {"plan": "TP4", "op_id": "op-1"})
    wave = WaveReport(1, 0, 4096, 0, 0.0, 0.0, 0.0)
    own = SwitchReport("auto-1", "TP4", "4xTP1", ok=True, duration_s=0.5, waves=[wave])
    failed = SwitchReport("auto-2", "4xTP1", "TP4", ok=False, message="no")
    for report in (own, own, failed):
        bench.app.state.service.metrics.saw_switch(report)
    found = {"from": "4xTP1", "to": "TP4", "reason": "admin"}
    assert value(bench, "nitsum:plan_switches_total", **found) == 1
    found = {"from": "TP4", "to": "4xTP1", "reason": "controller"}
    assert value(bench, "nitsum:plan_switches_total", **found) == 1
    found = {"from": "4xTP1", "to": "TP4"}
    assert value(bench, "nitsum:plan_switches_failed_total", **found) == 1
    assert value(bench, "nitsum:kv_migrated_bytes_total") == 4096
    assert value(bench, "nitsum:plan_active", plan="TP4") == 1
    assert value(bench, "nitsum:plan_active", plan="4xTP1") == 0
    assert value(bench, "vllm:kv_cache_usage_perc") == 0.25
    assert value(bench, "nitsum:kv_used_ratio", rank="0") == 0.25
    assert value(bench, "nitsum:engine_up") == 1
    assert value(bench, "vllm:num_requests_running") == 0
    assert value(bench, "nitsum:queue_depth", tier="batch") == 0


def test_every_metric_has_help_and_openmetrics_is_served(bench: Bench) -> None:
    families = list(text_string_to_metric_families(bench.get("/metrics").text))
    assert all(family.documentation for family in families)
    assert {family.name.split(":")[0] for family in families} == {"vllm", "nitsum"}
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = bench.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
