"""One record a call, equal to what its client saw; and the usage endpoint over it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nitsum.cli import main
from nitsum.engine.fake_client import FakeEngineClient
from nitsum.ledger.records import NANO, Prices, Record
from nitsum.ledger.store import Store
from nitsum.messages import Output
from nitsum.request import Request
from nitsum.server.keyfile import Key, change_keys, hash_token
from nitsum.tier import DEFAULT, PRIORITY, Tier
from tests.server.server_kit import MODEL, Bench, error_of, served

PRICES = Prices(2.0, 8.0)
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


class Kept:
    """A bench whose app runs its lifespan around each block of calls, so that records are kept."""

    def __init__(self, checkpoint: Path, path: Path, engine: Any = None, **changes: Any) -> None:
        self.path = path
        self.changes = {"ledger": str(path), "prices": PRICES, **changes}
        self.bench = Bench(checkpoint, engine, data_dir=path.parent, **self.changes)
        self.bench.says("Hello world")

    def run(self, body: Any) -> list[Record]:
        """`body(client)` with an HTTP client; returns the records there are then."""

        async def main() -> None:
            async with served(self.bench) as url, httpx.AsyncClient(base_url=url) as http:
                await asyncio.wait_for(body(http), 20)

        asyncio.run(main())
        return records_of(self.path)


def records_of(path: Path) -> list[Record]:
    store = Store(str(path))
    try:
        return list(store.records())
    finally:
        store.close()


async def chat(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={**BODY, **fields})


def usage_of(record: Record) -> dict[str, int]:
    return {"prompt_tokens": record.num_prompt, "completion_tokens": record.num_output}


def test_a_record_says_what_the_client_saw(checkpoint: Path, path: Path) -> None:
    answers: list[dict[str, Any]] = []

    async def body(http: httpx.AsyncClient) -> None:
        response = await chat(http, service_tier="priority", metadata={"chain_id": "c\0\ud7ff"})
        answers.append({**response.json(), "request_id": response.headers["x-request-id"]})

    (record,) = Kept(checkpoint, path).run(body)
    (answer,) = answers
    assert (record.id, record.request_id) == (answer["id"], answer["request_id"])
    assert usage_of(record).items() <= answer["usage"].items()
    assert (record.tier_asked, record.tier_served, record.status) == ("priority", "priority", "ok")
    assert (record.model, record.endpoint, record.plan) == (MODEL, "/v1/chat/completions", "TP1")
    assert (record.chain_id, record.met, record.billed) == ("c\ud7ff", True, True)
    assert record.ttft_target_ms == 300
    assert record.ttft_ms is not None
    assert 0 < record.ttft_ms <= record.duration_ms
    assert abs(record.at_ms / 1000 - time.time()) < 30
    expected = (record.num_prompt * 2.0 + record.num_output * 8.0) * PRIORITY.price / 1e6
    assert record.cost_nano == round(expected * NANO)
    assert record.credit_nano == 0


def test_n_answers_are_one_call(checkpoint: Path, path: Path) -> None:
    usages: list[dict[str, int]] = []

    async def body(http: httpx.AsyncClient) -> None:
        usages.append((await chat(http, n=3)).json()["usage"])
        texts = {"model": MODEL, "prompt": ["one", "two two"], "n": 2}
        usages.append((await http.post("/v1/completions", json=texts)).json()["usage"])

    records = Kept(checkpoint, path).run(body)
    for record, usage in zip(records, usages, strict=True):
        assert usage_of(record).items() <= usage.items()


def test_a_downgrade_is_billed_as_what_it_got(checkpoint: Path, path: Path) -> None:
    engine = FakeEngineClient(tier=lambda request: ("default", "priority is at capacity"))

    async def body(http: httpx.AsyncClient) -> None:
        await chat(http, service_tier="priority")

    (record,) = Kept(checkpoint, path, engine).run(body)
    assert (record.tier_asked, record.tier_served) == ("priority", "default")
    assert record.reason == "priority is at capacity"
    assert record.multiplier == DEFAULT.price
    assert record.cost_nano == PRICES.cost_nano(record.num_prompt, record.num_output, 1.0)


def test_refused_work_costs_nothing(checkpoint: Path, path: Path) -> None:
    def refuse(request: Request) -> Output:
        return Output(
            request.request_id, error="full", error_status=429, error_code="resource_unavailable"
        )

    async def body(http: httpx.AsyncClient) -> None:
        assert (await chat(http, service_tier="flex")).status_code == 429
        assert (await chat(http, service_tier="flex", stream=True)).status_code == 429

    records = Kept(checkpoint, path, FakeEngineClient(refuse=refuse)).run(body)
    assert [r.status for r in records] == ["refused", "refused"]
    assert {r.error_code for r in records} == {"resource_unavailable"}
    assert {(r.cost_nano, r.billed, r.met, r.tier_served) for r in records} == {
        (0, False, None, "flex")
    }


def test_a_priority_call_that_missed_gets_the_premium_back(checkpoint: Path, path: Path) -> None:
    hasty = Tier("priority", 0, ttft_s=1e-9, tpot_s=1e-9, price=4.0, over_capacity="downgrade")
    slow = Tier("default", 1, ttft_s=1e-9, tpot_s=1e-9, price=1.0)

    async def body(http: httpx.AsyncClient) -> None:
        await chat(http, service_tier="priority")
        await chat(http, service_tier="default")

    first, second = Kept(checkpoint, path, tiers=(hasty, slow)).run(body)
    assert (first.met, second.met) == (False, False)
    assert first.cost_nano == 4 * second.cost_nano
    assert first.cost_nano - first.credit_nano == second.cost_nano
    assert second.credit_nano == 0


def test_a_client_that_left_pays_for_what_was_made(checkpoint: Path, path: Path) -> None:
    kept = Kept(checkpoint, path, FakeEngineClient(delay_s=0.02))
    kept.bench.says("the quick brown fox " * 30)

    async def body(http: httpx.AsyncClient) -> None:
        url = "/v1/chat/completions"
        async with http.stream("POST", url, json={**BODY, "stream": True}) as response:
            async for line in response.aiter_lines():
                if "the" in line:
                    break

    (record,) = kept.run(body)
    assert (record.status, record.billed, record.met) == ("aborted", True, None)
    assert 1 <= record.num_output < 60
    assert record.cost_nano > 0


def test_our_failures_are_not_billed(checkpoint: Path, path: Path) -> None:
    kept = Kept(checkpoint, path, FakeEngineClient(delay_s=0.02))
    kept.bench.says("the quick brown fox " * 30)

    async def body(http: httpx.AsyncClient) -> None:
        async with http.stream(
            "POST", "/v1/chat/completions", json={**BODY, "stream": True}
        ) as response:
            async for line in response.aiter_lines():
                if "the" in line:
                    kept.bench.engine.die()

    (record,) = kept.run(body)
    assert (record.status, record.billed, record.cost_nano) == ("error", False, 0)
    assert record.num_output >= 1


def test_nothing_is_lost_when_the_server_ends(checkpoint: Path, path: Path) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        await asyncio.gather(*(chat(http, seed=i) for i in range(40)))

    assert len(Kept(checkpoint, path).run(body)) == 40


def test_what_a_key_could_not_have_is_recorded(checkpoint: Path, path: Path) -> None:
    keys = path.parent / "keys.json"
    change_keys(keys, lambda _: [Key(id="k1", sha256=hash_token("t"), tenant="acme", rpm=1)])

    async def body(http: httpx.AsyncClient) -> None:
        http.headers["authorization"] = "Bearer t"
        assert (await chat(http)).status_code == 200
        assert (await chat(http)).status_code == 429

    first, second = Kept(checkpoint, path, keys=keys).run(body)
    assert (first.key_id, first.tenant, first.status) == ("k1", "acme", "ok")
    assert (second.status, second.error_code, second.cost_nano) == (
        "refused",
        "insufficient_quota",
        0,
    )


def test_a_budget_outlives_the_server(checkpoint: Path, path: Path) -> None:
    keys = path.parent / "keys.json"
    change_keys(keys, lambda _: [Key(id="k1", sha256=hash_token("t"), budget=1e-9)])

    async def body(http: httpx.AsyncClient) -> None:
        http.headers["authorization"] = "Bearer t"
        await chat(http)

    kept = Kept(checkpoint, path, keys=keys)
    assert [r.status for r in kept.run(body)] == ["ok"]
    anew = Kept(checkpoint, path, keys=keys)
    assert [r.status for r in anew.run(body)] == ["ok", "refused"]


# --- usage and report -----------------------------------------------------------------------------


def test_usage_in_buckets(checkpoint: Path, path: Path) -> None:
    pages: dict[str, Any] = {}
    sums = {"input_tokens": 0, "output_tokens": 0, "num_model_requests": 0}

    async def body(http: httpx.AsyncClient) -> None:
        for tier in ("default", "flex", "flex"):
            usage = (await chat(http, service_tier=tier)).json()["usage"]
            sums["input_tokens"] += usage["prompt_tokens"]
            sums["output_tokens"] += usage["completion_tokens"]
            sums["num_model_requests"] += 1
        start = int(time.time()) - 3600
        url = f"/v1/organization/usage/completions?start_time={start}&bucket_width=1d"
        for name, extra in {
            "all": "",
            "grouped": "&group_by=service_tier&group_by[]=model&group_by=batch",
            "batch": "&batch=true",
            "other": "&models=nobody",
        }.items():
            pages[name] = (await http.get(url + extra)).json()
        minutes = f"/v1/organization/usage/completions?start_time={start}&bucket_width=1m"
        pages["paged"] = [(await http.get(minutes)).json()]
        while pages["paged"][-1]["has_more"]:
            more = f"{minutes}&page={pages['paged'][-1]['next_page']}"
            pages["paged"].append((await http.get(more)).json())

    Kept(checkpoint, path).run(body)
    (bucket,) = pages["all"]["data"]
    (result,) = bucket["results"]
    assert result["object"] == "organization.usage.completions.result"
    assert sums.items() <= result.items()
    groups = pages["grouped"]["data"][0]["results"]
    assert [(g["service_tier"], g["num_model_requests"]) for g in groups] == [
        ("default", 1),
        ("flex", 2),
    ]
    assert {(g["model"], g["batch"], g["api_key_id"]) for g in groups} == {(MODEL, False, None)}
    assert pages["batch"]["data"][0]["results"] == pages["other"]["data"][0]["results"] == []
    assert len(pages["paged"]) == 2
    found = [r for page in pages["paged"] for b in page["data"] for r in b["results"]]
    assert sum(r["num_model_requests"] for r in found) == 3


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=soon", "start_time"),
        ("start_time=1&bucket_width=2d", "bucket_width"),
        ("start_time=1&limit=99", "limit"),
        ("start_time=1&group_by=user_id", "group_by"),
        ("start_time=1&project_ids=p", "project_ids"),
        ("start_time=1&batch=maybe", "batch"),
    ],
)
def test_bad_usage_queries(bench: Bench, query: str, param: str) -> None:
    response = bench.get(f"/v1/organization/usage/completions?{query}")
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_a_key_sees_its_tenants_usage_alone(checkpoint: Path, path: Path) -> None:
    keys = path.parent / "keys.json"
    made = [Key(id=t, sha256=hash_token(t), tenant=t) for t in ("a", "b")]
    change_keys(keys, lambda _: made)
    seen: dict[str, int] = {}

    async def body(http: httpx.AsyncClient) -> None:
        for token, count in (("a", 1), ("b", 2)):
            http.headers["authorization"] = f"Bearer {token}"
            for _ in range(count):
                await chat(http)
            url = f"/v1/organization/usage/completions?start_time={int(time.time()) - 60}"
            (bucket,) = (await http.get(url)).json()["data"]
            seen[token] = bucket["results"][0]["num_model_requests"]

    Kept(checkpoint, path, keys=keys).run(body)
    assert seen == {"a": 1, "b": 2}


def test_the_openai_client_reads_usage(checkpoint: Path, path: Path) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        await chat(http)
        async with openai.AsyncOpenAI(
            base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key="x", admin_api_key="x"
        ) as client:
            page = await client.admin.organization.usage.completions(
                start_time=int(time.time()) - 60, group_by=["service_tier"]
            )
            (bucket,) = page.data
            (result,) = bucket.results
            assert result.object == "organization.usage.completions.result"
            assert (result.num_model_requests, result.service_tier) == (1, "default")

    Kept(checkpoint, path).run(body)


def test_the_report_adds_up(
    checkpoint: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usages: list[dict[str, int]] = []

    async def body(http: httpx.AsyncClient) -> None:
        for tier in ("priority", "default", "flex"):
            usages.append((await chat(http, service_tier=tier)).json()["usage"])
            await asyncio.sleep(0.005)

    kept = Kept(checkpoint, path, num_ranks=4, device="cuda")
    kept.run(body)
    assert main(["report", "--ledger", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["tier"] for line in report["lines"]] == ["priority", "default", "flex"]
    total = report["total"]
    assert total["num_prompt_tokens"] == sum(u["prompt_tokens"] for u in usages)
    assert total["num_output_tokens"] == sum(u["completion_tokens"] for u in usages)
    assert total["flat_revenue"] * (2.0 + 1.0 + 0.5) / 3 == pytest.approx(total["price"])
    assert report["gpu_hours"] > 0
    earned = report["revenue_per_gpu_hour"] / report["flat_revenue_per_gpu_hour"]
    assert earned == pytest.approx(total["revenue"] / total["flat_revenue"])
    assert main(["report", "--ledger", str(path)]) == 0
    text = capsys.readouterr().out
    assert "flat price" in text
    assert "GPU-hour" in text
    for word in ("priority", "default", "flex", "credit"):
        assert f" {word} " in text
    assert main(["report", "--ledger", str(path), "--since", "2999-01-01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == []
    assert main(["report", "--ledger", str(path.parent / "none.db")]) == 2


def test_without_a_ledger_usage_says_so(bench: Bench) -> None:
    response = bench.get("/v1/organization/usage/completions?start_time=1")
    assert response.status_code == 404
    assert "--ledger" in error_of(response)["message"]
