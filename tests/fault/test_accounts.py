"""A run with refusals, downgrades, clients that leave and faults: the ledger is what they count."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import pytest

from nitsum.ledger.records import Record
from tests.fault.accounts import (
    accounted_calls,
    client_totals,
    compare,
    flags,
    ledger_totals,
    make_keys,
    read_ledger,
    run_accounted,
)
from tests.fault.running import RunningServer

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

NUM_CALLS = 80


def test_the_ledger_is_what_clients_count(checkpoint: Path, tmp_path: Path) -> None:
    tokens = make_keys(tmp_path / "keys.json")
    own = ("--ranks", "2", "--kv-memory", "8MiB", "--max-num-seqs", "4")
    keys = ("--keys", str(tmp_path / "keys.json"))
    with RunningServer(checkpoint, tmp_path, *own, *keys, *flags(tmp_path)) as server:
        calls = accounted_calls(NUM_CALLS, tokens, seed=2)
        answers = run_accounted(server, calls, num_worker_kills=1)
        shown = httpx.get(f"{server.url}/metrics").text
    records, report = read_ledger(tmp_path)
    assert compare(answers, records) == []
    assert client_totals(answers, records) == ledger_totals(report)
    lines = [line for line in shown.splitlines() if line.startswith("vllm:generation_tokens_total")]
    assert float(lines[0].split()[-1]) == sum(record.num_output for record in records)
    _nothing_was_left_out(Counter(record.status for record in records), records)


def _nothing_was_left_out(statuses: Counter[str], records: list[Record]) -> None:
    """The run had all that it is about."""
    assert {"ok", "aborted", "refused"} <= set(statuses)
    codes = {record.error_code for record in records}
    assert {"insufficient_quota", "rate_limit_exceeded", "server_is_overloaded"} <= codes
    assert any(record.tier_served != record.tier_asked and record.billed for record in records)
