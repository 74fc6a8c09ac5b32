"""The ledger beside what clients counted themselves: every call, and the sums."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nitsum.ledger.records import Prices, Record
from nitsum.ledger.report import Report, build_report
from nitsum.ledger.store import Store
from nitsum.server.keyfile import Key, change_keys, hash_token, new_token
from tests.fault.calls import Answer, Call, ask_all, mixed_calls
from tests.fault.running import RunningServer
from tests.fault.trouble import kill_one, open_client, until_tokens

PRICES = Prices(2.0, 8.0)
MULTIPLIERS = {"priority": 2.0, "default": 1.0, "flex": 0.5, "batch": 0.5}
TIERS = """
- {name: priority, level: 0, ttft_s: 0.2, tpot_s: 0.05, price: 2, over_capacity: downgrade}
- {name: default, level: 1, ttft_s: 600, tpot_s: 60}
- {name: flex, level: 2, deadline_s: 6000, price: 0.5, max_queue_requests: 1}
- {name: batch, level: 3, deadline_s: 6000, price: 0.5}
"""
"""Some priority calls miss their targets, and some flex calls find no place in the queue."""
LIMITS: dict[str, dict[str, Any]] = {
    "open": {},
    "clamped": {"max_tier": "default"},
    "slow": {"rpm": 6},
    "narrow": {"concurrency": 1},
}
"""Tenants, and what their keys may do."""


def make_keys(path: Path) -> dict[str, str]:
    """A key file with a key for each tenant; their tokens."""
    tokens = {tenant: new_token() for tenant in LIMITS}
    keys = [
        Key(id=f"key_{tenant}", sha256=hash_token(token), tenant=tenant, **LIMITS[tenant])
        for tenant, token in tokens.items()
    ]
    change_keys(path, lambda _: keys)
    return tokens


def flags(folder: Path) -> tuple[str, ...]:
    """What the server is started with."""
    tiers = folder / "tiers.yaml"
    tiers.write_text(TIERS)
    prices = ("--price-input", str(PRICES.input), "--price-output", str(PRICES.output))
    return ("--tiers", str(tiers), "--ledger", str(folder / "ledger.db"), *prices)


def accounted_calls(num_calls: int, tokens: dict[str, str], seed: int) -> list[Call]:
    """Mixed calls of all tenants; a tenth of the clients leave, and some send what is refused."""
    draw = random.Random(seed)
    calls: list[Call] = []
    for i, call in enumerate(mixed_calls(num_calls, seed)):
        key = tokens[draw.choice([*LIMITS, "open"])]
        body = dict(call.body)
        leaves = call.streams and draw.random() < 0.25
        if leaves:
            usage = {"include_usage": True, "continuous_usage_stats": True}
            body |= {"max_tokens": 400, "stream_options": usage}
        if draw.random() < 0.05:
            body["temperature"] = -1
        calls.append(replace(call, body=body, key=key, leaves=leaves, id=f"call-{i}"))
    return calls


def run_accounted(server: RunningServer, calls: list[Call], num_worker_kills: int) -> list[Answer]:
    """The calls, while workers die, and in the end the engine."""

    async def main() -> list[Answer]:
        answers: list[Answer] = []
        async with open_client(server) as http:
            running = asyncio.create_task(ask_all(http, calls, answers))
            await _break(server, answers, num_worker_kills)
            await running
        return answers

    return asyncio.run(main())


async def _break(server: RunningServer, answers: list[Answer], num_kills: int) -> None:
    draw = random.Random(num_kills)
    while not answers:
        await asyncio.sleep(0.01)
    total = 20 * len(answers)
    for kill in range(num_kills):
        await until_tokens(lambda: answers, total * (kill + 1) / (num_kills + 2))
        await asyncio.to_thread(kill_one, server, draw)
    await until_tokens(lambda: answers, total * (num_kills + 1) / (num_kills + 2))
    await asyncio.to_thread(server.engine().kill)


@dataclass(frozen=True)
class Counted:
    """What a client knows of a call that left a record."""

    status: str
    tier: str
    num_prompt: int
    num_output: int
    cost_nano: int
    code: str | None


def counted(answer: Answer) -> Counted | None:
    """From the client's side alone; None for a call that leaves no record."""
    if answer.status in (400, 401):
        return None
    if answer.error is not None:
        return Counted("failed", "", 0, 0, 0, answer.error["code"])
    assert answer.usage is not None, answer
    counts = (answer.usage["prompt_tokens"], answer.usage["completion_tokens"])
    cost = PRICES.cost_nano(*counts, MULTIPLIERS[answer.tier])
    return Counted("aborted" if answer.left else "ok", answer.tier, *counts, cost, None)


def compare(answers: list[Answer], records: list[Record]) -> list[str]:
    """In words, every call whose record is not what its client counted."""
    by_call = {record.request_id: record for record in records}
    expected = {answer.call.id: counted(answer) for answer in answers}
    wrong = [f"{id} has a record" for id in by_call if expected[id] is None]
    for id, one in expected.items():
        record = by_call.get(id)
        if one is not None and (record is None or not _agrees(one, record)):
            wrong.append(f"{id}: {one} but {record}")
    if len(by_call) != len(records):
        wrong.append("a call has two records")
    return wrong


def _agrees(one: Counted, record: Record) -> bool:
    billed = (record.num_prompt, record.num_output, record.cost_nano)
    if one.status == "failed":
        unbilled = not record.billed and record.cost_nano == record.credit_nano == 0
        return record.status in ("refused", "error") and unbilled and record.error_code == one.code
    if (record.status, record.tier_served) != (one.status, one.tier):
        return False
    if one.status == "ok":
        return record.billed and billed == (one.num_prompt, one.num_output, one.cost_nano)
    # What was made before the server heard that its client had gone, and at least what it had seen.
    made = PRICES.cost_nano(one.num_prompt, record.num_output, MULTIPLIERS[one.tier])
    return record.num_output >= one.num_output and billed == (one.num_prompt, billed[1], made)


def client_totals(answers: list[Answer], records: list[Record]) -> Counter[str]:
    """Sums of what clients counted; tokens of those that left as the ledger has them."""
    outputs = {record.request_id: record.num_output for record in records}
    totals: Counter[str] = Counter()
    for answer in answers:
        one = counted(answer)
        if one is None:
            continue
        totals["num_requests"] += 1
        totals[f"num_{one.status}"] += 1
        if one.status != "failed":
            made = outputs[answer.call.id] if one.status == "aborted" else one.num_output
            totals["num_prompt_tokens"] += one.num_prompt
            totals["num_output_tokens"] += made
            totals["cost_nano"] += PRICES.cost_nano(one.num_prompt, made, MULTIPLIERS[one.tier])
    return totals


def ledger_totals(report: Report) -> Counter[str]:
    """The same sums as the statement has them."""
    line = report.total
    names = ("num_requests", "num_ok", "num_aborted", "num_prompt_tokens", "num_output_tokens")
    totals = Counter({name: getattr(line, name) for name in (*names, "cost_nano")})
    totals["num_failed"] = line.num_refused + line.num_errors
    return totals


def read_ledger(folder: Path) -> tuple[list[Record], Report]:
    """All records of a server that has ended, and its statement."""
    store = Store(str(folder / "ledger.db"))
    try:
        records = list(store.records())
        return records, build_report(records, store.runs())
    finally:
        store.close()
