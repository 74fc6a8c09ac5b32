"""The demo model under schemas, while the layout changes: answers are valid, and all are booked."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nitsum.cli.checkpoint import demo_folder, is_complete
from nitsum.ledger.store import Store

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not is_complete(demo_folder()), reason="the demo model is not here: nitsum fetch-demo"
    ),
]
pytest.importorskip("llguidance", reason="llguidance is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "river": {"type": "string", "maxLength": 12},
        "length_km": {"type": "integer", "minimum": 1, "maximum": 9999},
        "navigable": {"type": "boolean"},
        "banks": {"type": "array", "items": {"enum": ["left", "right"]}, "maxItems": 2},
    },
    "required": ["river", "length_km", "navigable", "banks"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "river", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A real server on two ranks: its URL, and its ledger, complete when the fixture has ended."""
    folder = tmp_path_factory.mktemp("served")
    sizes = ["--kv-memory", "64MiB", "--max-model-len", "512", "--max-num-seqs", "8"]
    plans = ["--ranks", "2", "--plans", "2xTP1,TP2", "--port", "0"]
    command = [sys.executable, "-m", "nitsum.cli", "serve", "demo", "--data-dir", str(folder)]
    process = subprocess.Popen([*command, *sizes, *plans], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = (re.search(r"at (http://\S+)", line) for line in process.stdout)
        yield next(match[1] for match in found if match), folder / "ledger.db"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def ask(seed: int, **fields: Any) -> dict[str, Any]:
    text = "Tell me about a river of your choice."
    return {
        "messages": [{"role": "user", "content": text}],
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": 120,
        **fields,
    }


def check_river(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["river", "length_km", "navigable", "banks"]
    assert len(found["river"]) <= 12
    assert 1 <= found["length_km"] <= 9999
    assert isinstance(found["navigable"], bool)
    assert set(found["banks"]) <= {"left", "right"}
    assert len(found["banks"]) <= 2


def test_answers_keep_to_their_schema_across_switches(server: tuple[str, Path]) -> None:
    url, _ = server
    answers: list[dict[str, Any]] = []

    async def one(http: httpx.AsyncClient, seed: int, fields: dict[str, Any]) -> None:
        response = await http.post("/v1/chat/completions", json=ask(seed, **fields))
        assert response.status_code == 200, response.text
        answers.append(response.json())

    async def switch(http: httpx.AsyncClient) -> None:
        for plan in ("TP2", "2xTP1", "TP2"):
            await asyncio.sleep(0.7)
            response = await http.post("/admin/plans/switch", json={"plan": plan})
            assert response.status_code == 200, response.text

    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            calls = [one(http, seed, {"response_format": FORMAT}) for seed in range(6)]
            await asyncio.gather(*calls, switch(http))

    asyncio.run(main())
    ended = [choice for answer in answers for choice in answer["choices"]]
    assert [choice["finish_reason"] for choice in ended] == ["stop"] * 6
    for choice in ended:
        check_river(choice["message"]["content"])
    assert len({choice["message"]["content"] for choice in ended}) > 1


def test_a_free_answer_shares_the_batch_with_one_that_is_not(server: tuple[str, Path]) -> None:
    url, _ = server

    async def main() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            free = http.post("/v1/chat/completions", json=ask(1, temperature=0, max_tokens=16))
            held = http.post("/v1/chat/completions", json=ask(2, response_format=FORMAT))
            together = await asyncio.gather(free, held)
            alone = await http.post(
                "/v1/chat/completions", json=ask(1, temperature=0, max_tokens=16)
            )
            return [response.json() for response in (*together, alone)]

    free, held, alone = asyncio.run(main())
    check_river(held["choices"][0]["message"]["content"])
    assert free["choices"][0]["message"] == alone["choices"][0]["message"]


def test_the_ledger_has_what_the_clients_saw(server: tuple[str, Path]) -> None:
    url, ledger = server

    async def main() -> list[dict[str, int]]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            tiers = ("priority", "default", "flex")
            calls = [
                http.post("/v1/chat/completions", json=ask(3, max_tokens=4, service_tier=tier))
                for tier in tiers
            ]
            usages = [response.json()["usage"] for response in await asyncio.gather(*calls)]
            # Asking for usage stores what has ended.
            await http.get("/v1/organization/usage/completions?start_time=0&bucket_width=1d")
            return usages

    usages = asyncio.run(main())
    store = Store(str(ledger))
    records = list(store.records())[-3:]
    store.close()
    assert sum(r.num_prompt for r in records) == sum(u["prompt_tokens"] for u in usages)
    assert sum(r.num_output for r in records) == sum(u["completion_tokens"] for u in usages)
    assert {r.tier_asked for r in records} == {"priority", "default", "flex"}
    assert {r.plan for r in records} <= {"2xTP1", "TP2"}
