"""The ledger against what clients counted: refusals, downgrades, clients that leave, failures."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.ledger.records import Prices, Record
from nitsum.ledger.store import Store
from nitsum.messages import Output
from nitsum.request import Request
from nitsum.server.keyfile import Key, change_keys, hash_token
from tests.server.server_kit import MODEL, Bench, served

NUM_CALLS = 200
TENANTS = ("a", "b", "c")
TIERS = ("priority", "default", "flex", "batch")


class MixedEngine(FakeEngineClient):
    """Refuses some, serves some as less than asked, breaks off some in the middle."""

    def __init__(self, seed: int) -> None:
        super().__init__(delay_s=0.002, refuse=self._refusal, tier=self._served_as)
        self._chance = random.Random(seed)
        self._cut: set[str] = set()

    def _refusal(self, request: Request) -> Output | None:
        chance = self._chance.random()
        if chance < 0.1:
            return Output(request.request_id, error="full", error_status=429, error_code="full")
        if chance < 0.2:
            self._cut.add(request.request_id)
        return None

    def _served_as(self, request: Request) -> tuple[str, str | None]:
        if request.tier == "priority" and len(request.prompt) % 2:
            return "default", "over capacity"
        return request.tier, None

    def _outputs(self, request: Request) -> Sequence[Output]:
        outputs = list(super()._outputs(request))
        if request.request_id in self._cut:
            gone = Output(request.request_id, error="lost", error_status=500)
            return [*outputs[: len(outputs) // 2], gone]
        return outputs


@dataclass
class Seen:
    """What one client knows of its call."""

    id: str
    tenant: str
    tier_asked: str
    status: str
    tier: str = ""
    num_prompt: int = 0
    num_output: int = 0
    """Of a client that left: what had come by then."""


async def call(http: httpx.AsyncClient, name: str, chance: random.Random) -> Seen:
    tenant, tier = chance.choice(TENANTS), chance.choice(TIERS)
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": "the quick brown fox " * chance.randint(1, 4),
        "max_tokens": chance.randint(1, 12),
        "service_tier": tier,
        "n": chance.choice((1, 1, 2)),
    }
    seen = Seen(name, tenant, tier, "ok")
    headers = {"authorization": f"Bearer {tenant}", "x-request-id": name}
    if chance.random() < 0.5:
        response = await http.post("/v1/completions", json=body, headers=headers)
        _note_whole(seen, response)
    else:
        leaves_after = chance.choice((None, None, 1, 3))
        await _stream(http, body, headers, seen, leaves_after)
    return seen


def _note_whole(seen: Seen, response: httpx.Response) -> None:
    if response.status_code == 200:
        _note(seen, response.json())
    else:
        seen.status = "refused" if response.status_code == 429 else "error"


def _note(seen: Seen, body: dict[str, Any]) -> None:
    seen.tier = body["service_tier"]
    seen.num_prompt = body["usage"]["prompt_tokens"]
    seen.num_output = body["usage"]["completion_tokens"]


async def _stream(
    http: httpx.AsyncClient,
    body: dict[str, Any],
    headers: dict[str, str],
    seen: Seen,
    leaves_after: int | None,
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {**body, "stream": True, "stream_options": options}
    async with http.stream("POST", "/v1/completions", json=asked, headers=headers) as response:
        if response.status_code != 200:
            seen.status = "refused" if response.status_code == 429 else "error"
            return
        num_events = 0
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if not line:
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                seen.status = "refused" if event["error"]["code"] == "full" else "error"
                return
            _note(seen, event)
            num_events += 1
            if num_events == leaves_after:
                seen.status = "left"
                return


def test_the_ledger_equals_the_clients_count(checkpoint: Path, tmp_path: Path) -> None:
    keys, ledger = tmp_path / "keys.json", tmp_path / "ledger.db"
    made = [Key(id=f"key_{t}", sha256=hash_token(t), tenant=t) for t in TENANTS]
    # One tenant may not have the most urgent tier.
    made[2] = Key(id="key_c", sha256=hash_token("c"), tenant="c", max_tier="default")
    change_keys(keys, lambda _: made)
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    bench = Bench(
        checkpoint,
        MixedEngine(seed),
        keys=keys,
        ledger=str(ledger),
        data_dir=tmp_path,
        prices=Prices(1.0, 3.0),
    )

    async def main() -> list[Seen]:
        async with served(bench) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
            room = asyncio.Semaphore(16)

            async def one(name: str) -> Seen:
                async with room:
                    return await call(http, name, chance)

            return await asyncio.gather(*(one(f"call-{i}") for i in range(NUM_CALLS)))

    seen = asyncio.run(main())
    store = Store(str(ledger))
    records = list(store.records())
    store.close()
    check(seen, records, f"seed {seed}")


def check(seen: list[Seen], records: list[Record], hint: str) -> None:
    """One record for each call, and it says what its client saw."""
    by_id = {record.request_id: record for record in records}
    assert len(seen) == len(records) == len(by_id) == NUM_CALLS, hint
    assert {one.status for one in seen} == {"ok", "refused", "error", "left"}, hint
    for one in seen:
        record = by_id[one.id]
        assert (record.tenant, record.tier_asked) == (one.tenant, one.tier_asked), hint
        if one.status == "left":
            check_left(one, record, hint)
        else:
            assert record.status == one.status, hint
            assert record.billed == (one.status == "ok"), hint
        if one.status == "ok":
            tokens = (record.num_prompt, record.num_output)
            assert tokens == (one.num_prompt, one.num_output), hint
            assert record.tier_served == one.tier, hint
        assert (record.cost_nano > 0) == record.billed, hint
        assert record.tenant != "c" or record.tier_served != "priority", hint


def check_left(one: Seen, record: Record, hint: str) -> None:
    """Who leaves pays for what has come, and for what was made before the server knew."""
    assert record.billed == (record.status in ("ok", "aborted")), hint
    assert record.num_prompt == one.num_prompt, hint
    assert record.num_output >= one.num_output > 0, hint
