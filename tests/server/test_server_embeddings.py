"""`/v1/embeddings` over a fake engine: shapes, tiers, books, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from array import array
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.messages import Output
from nitsum.request import Request
from nitsum.server.embeddings import scaled
from tests.server.server_kit import MAX_MODEL_LEN, MODEL, Bench, error_of, served
from tests.server.test_server_ledger import PRICES, Kept

PATH = "/v1/embeddings"


def embed(bench: Bench, value: object, **fields: Any) -> httpx.Response:
    return bench.post(PATH, {"model": MODEL, "input": value, **fields})


def expected(tokens: list[int]) -> list[float]:
    """The fake engine's state of a prompt, of length 1."""
    values = (3.0, 4.0, float(sum(tokens)))
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def test_texts_and_tokens_come_back_in_order(bench: Bench) -> None:
    ids = bench.codec.encode("hello", add_special_tokens=True, param="")
    for value, prompts in (
        ("hello", [ids]),
        (["hello", "hello there"], [ids, bench.ids("hello there")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ):
        answer = embed(bench, value).json()
        assert (answer["object"], answer["model"]) == ("list", MODEL)
        assert [one["index"] for one in answer["data"]] == list(range(len(prompts)))
        for one, prompt in zip(answer["data"], prompts, strict=True):
            assert one["object"] == "embedding"
            assert one["embedding"] == pytest.approx(expected(prompt), rel=1e-6)
        total = sum(len(prompt) for prompt in prompts)
        assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}


def test_base64_is_the_same_numbers(bench: Bench) -> None:
    (plain,) = embed(bench, "hello").json()["data"]
    (packed,) = embed(bench, "hello", encoding_format="base64").json()["data"]
    unpacked = array("f", base64.b64decode(packed["embedding"]))
    assert list(unpacked) == plain["embedding"]


def test_they_have_length_one() -> None:
    assert math.dist(scaled(array("f", [3, 4])), [0.6, 0.8]) < 1e-7
    assert list(scaled(array("f", [0, 0]))) == [0, 0]


def test_the_engine_is_asked_for_a_state_and_no_answer(bench: Bench) -> None:
    embed(bench, [5, 6], priority=3)
    assert bench.sent.sampling.return_hidden
    assert bench.sent.sampling.max_tokens == 1
    assert (bench.sent.prompt, bench.sent.order) == ([5, 6], 3)


@pytest.mark.parametrize(
    ("asked", "tier"),
    [(None, "flex"), ("auto", "flex"), ("batch", "batch"), ("default", "default")],
)
def test_it_is_background_work_unless_told_otherwise(
    bench: Bench, asked: str | None, tier: str
) -> None:
    answer = embed(bench, "hello", service_tier=asked)
    assert answer.json()["service_tier"] == tier
    assert bench.sent.tier == tier
    assert answer.headers["x-nitsum-plan"] == "TP1"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": [512]}, "input"),
        ({"input": None}, "input"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "normalize": False}, "normalize"),
        ({"input": "x", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [1] * MAX_MODEL_LEN}, "input"),
        ({"input": "x", "service_tier": "gold"}, "service_tier"),
        ({"input": "x", "priority": 2**40}, "priority"),
    ],
)
def test_bad_fields_are_named(bench: Bench, fields: dict[str, Any], param: str) -> None:
    answer = bench.post(PATH, {"model": MODEL, **fields})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert bench.engine.requests == []


def test_a_refusal_is_the_engines(checkpoint: Path) -> None:
    def refuse(request: Request) -> Output:
        return Output(
            request.request_id,
            finish_reason="error",
            error="No capacity.",
            error_status=429,
            error_code="resource_unavailable",
        )

    answer = embed(Bench(checkpoint, FakeEngineClient(refuse=refuse)), ["a", "b"])
    assert (answer.status_code, error_of(answer)["code"]) == (429, "resource_unavailable")
    assert int(answer.headers["retry-after-ms"]) > 0


def test_a_call_is_one_record_of_prompt_tokens(checkpoint: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []

    async def body(http: httpx.AsyncClient) -> None:
        call = {"model": MODEL, "input": ["hello", "hello there"]}
        found.append((await http.post(PATH, json=call)).json())
        usage = f"?start_time={int(time.time()) - 60}&bucket_width=1h"
        for kind in ("embeddings", "completions"):
            page = (await http.get(f"/v1/organization/usage/{kind}{usage}")).json()
            found.append({"results": [r for one in page["data"] for r in one["results"]]})

    (record,) = Kept(checkpoint, tmp_path / "ledger.db").run(body)
    answer, embedded, completed = found
    num_prompt = answer["usage"]["prompt_tokens"]
    assert (record.endpoint, record.status, record.billed) == (PATH, "ok", True)
    assert (record.num_prompt, record.num_output, record.tier_served) == (num_prompt, 0, "flex")
    assert record.cost_nano == PRICES.cost_nano(num_prompt, 0, 0.5)
    assert completed["results"] == []
    (result,) = embedded["results"]
    assert (result["input_tokens"], result["num_model_requests"]) == (num_prompt, 1)
    assert result["object"] == "organization.usage.embeddings.result"


def test_the_openai_client_reads_them(bench: Bench) -> None:
    async def main() -> list[list[float]]:
        async with served(bench) as url:
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
            # Without encoding_format, the client asks for base64 and unpacks it.
            packed = await client.embeddings.create(model=MODEL, input=["hello", "hello there"])
            plain = await client.embeddings.create(
                model=MODEL, input="hello", encoding_format="float"
            )
            await client.close()
            return [packed.data[0].embedding, plain.data[0].embedding]

    packed, plain = asyncio.run(main())
    assert packed == pytest.approx(plain)
