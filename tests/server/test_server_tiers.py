"""Tiers, targets, chains and the headers that tell how a request was served."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.request import Request
from nitsum.tier import DEFAULT, FLEX
from tests.server.server_kit import MODEL, Bench, error_of, events_of

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def sent_with(bench: Bench, headers: dict[str, str], **fields: object) -> Request:
    response = bench.post("/v1/chat/completions", {**CHAT, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    return bench.sent


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (None, "default"),
        ("auto", "default"),
        ("standard", "default"),
        ("fast", "priority"),
        ("scale", "priority"),
        ("flex", "flex"),
        ("batch", "batch"),
    ],
)
def test_the_tier_served_is_in_the_answer_and_in_every_chunk(
    bench: Bench, asked: str | None, served: str
) -> None:
    bench.says("x")
    assert bench.chat(service_tier=asked).json()["service_tier"] == served
    options = {"include_usage": True}
    chunks = events_of(bench.chat(service_tier=asked, stream=True, stream_options=options))
    assert {chunk["service_tier"] for chunk in chunks} == {served}
    assert {request.tier for request in bench.engine.requests} == {served}
    assert bench.complete(service_tier=asked).json()["service_tier"] == served


def test_auto_is_the_configured_default(checkpoint: Path) -> None:
    bench = Bench(checkpoint, default_tier="flex").says("x")
    assert bench.chat().json()["service_tier"] == "flex"


def test_only_configured_tiers_exist(checkpoint: Path) -> None:
    bench = Bench(checkpoint, tiers=(DEFAULT, FLEX))
    error = error_of(bench.chat(service_tier="priority"))
    assert error["param"] == "service_tier"
    assert "flex" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_downgrade_says_so(checkpoint: Path, stream: bool) -> None:
    engine = FakeEngineClient(tier=lambda request: ("default", "priority is at capacity"))
    bench = Bench(checkpoint, engine).says("x")
    response = bench.chat(service_tier="priority", stream=stream)
    assert response.headers["x-nitsum-reason"] == "priority is at capacity"
    body = events_of(response)[0] if stream else response.json()
    assert body["service_tier"] == "default"
    assert bench.sent.tier_asked == "priority"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_a_promise_says_so(checkpoint: Path, stream: bool) -> None:
    bench = Bench(checkpoint, FakeEngineClient(late=True)).says("x")
    response = bench.chat(service_tier="priority", stream=stream)
    assert response.headers["x-nitsum-late"] == "true"
    assert "x-nitsum-reason" not in response.headers
    body = events_of(response)[0] if stream else response.json()
    assert body["service_tier"] == "priority"


def test_one_downgraded_answer_of_two_is_not_called_priority(checkpoint: Path) -> None:
    engine = FakeEngineClient(
        tier=lambda r: ("default" if r.request_id.endswith("1") else "priority", None)
    )
    bench = Bench(checkpoint, engine).says("x")
    assert bench.chat(service_tier="priority", n=2).json()["service_tier"] == "default"


@pytest.mark.parametrize("text", ["größer\r\nx: y", "漢"])
def test_odd_reasons_do_not_break_headers(checkpoint: Path, text: str) -> None:
    bench = Bench(checkpoint, FakeEngineClient(tier=lambda r: ("default", text))).says("x")
    response = bench.chat(service_tier="priority")
    assert response.status_code == 200
    assert response.headers["x-nitsum-reason"].isascii()


@pytest.mark.parametrize("stream", [False, True])
def test_headers_of_the_response(bench: Bench, stream: bool) -> None:
    headers = bench.says("x").chat(stream=stream).headers
    assert headers["x-nitsum-plan"] == "TP1"
    assert headers["x-nitsum-lane"] == "TP1@0"
    assert headers["x-nitsum-queue-ms"] == "2"
    assert int(headers["openai-processing-ms"]) >= 0
    assert not {"x-nitsum-reason", "x-nitsum-late"} & set(headers)


def test_request_ids(bench: Bench) -> None:
    bench.says("x")
    body = bench.post("/v1/chat/completions", CHAT, headers={"x-request-id": "mine"})
    assert body.headers["x-request-id"] == "mine"
    first, second = (bench.chat().headers["x-request-id"] for _ in range(2))
    assert first != second
    odd = bench.post("/v1/chat/completions", CHAT, headers={"x-request-id": "a" * 999})
    assert odd.headers["x-request-id"] != "a" * 999
    assert "x-request-id" in bench.chat(n=0).headers
    assert len({request.request_id for request in bench.engine.requests}) == 4


def test_header_tiers_are_weaker_than_the_body(bench: Bench) -> None:
    headers = {"x-gateway-inference-objective": "flex"}
    assert sent_with(bench.says("x"), headers).tier == "flex"
    bench.engine.requests.clear()
    assert sent_with(bench, headers, service_tier="priority").tier == "priority"


def test_targets_chains_and_fairness_from_headers(bench: Bench) -> None:
    headers = {
        "x-slo-ttft-ms": "250",
        "x-llm-d-slo-tpot-ms": "12.5",
        "x-llm-d-inference-fairness-id": "team-a",
        "x-nitsum-chain-id": "chain-1",
        "x-nitsum-chain-deadline-ms": "5000",
    }
    request = sent_with(bench.says("x"), headers, user="someone", metadata={"chain_id": "other"})
    assert (request.ttft_target_s, request.tpot_target_s) == (0.25, 0.0125)
    assert (request.tenant, request.chain_id) == ("team-a", "chain-1")
    assert request.chain_deadline_s is not None
    assert request.chain_deadline_s - request.arrival_s == pytest.approx(5)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-ttft-ms", "nan"),
        ("x-llm-d-slo-ttft-ms", "-1"),
        ("x-slo-tpot-ms", "0"),
        ("x-llm-d-slo-tpot-ms", "inf"),
        ("x-nitsum-chain-deadline-ms", "1000"),
        ("x-llm-d-inference-objective", "gold"),
    ],
)
def test_bad_headers_are_named(bench: Bench, header: str, value: str) -> None:
    response = bench.post("/v1/chat/completions", CHAT, headers={header: value})
    assert response.status_code == 400
    assert error_of(response)["param"] == header
    assert bench.engine.requests == []


def test_cached_tokens_are_reported(checkpoint: Path) -> None:
    bench = Bench(checkpoint, FakeEngineClient(num_cached=3)).says("x")
    for n in (1, 2):
        usage = bench.chat(n=n).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
