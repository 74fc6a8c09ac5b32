"""The store on SQLite and on a real PostgreSQL, the writer under failures, the sums of a report."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from nitsum.ledger.records import NANO, Prices, Record, Run, credit_nano
from nitsum.ledger.report import build_report
from nitsum.ledger.store import LedgerError, Store
from nitsum.ledger.usage import UsageQuery, read_usage
from nitsum.ledger.writer import LedgerWriter, new_run
from nitsum.tier import BATCH, PRIORITY, TierSet

RUN = Run(id="run-1", started_ms=0, seen_ms=0, num_ranks=2, device="cuda")


def record(name: str, **fields: Any) -> Record:
    usual: dict[str, Any] = {
        "request_id": f"req-{name}",
        "run_id": "run-1",
        "at_ms": 1_000_000,
        "key_id": "k",
        "tenant": "t",
        "model": "m",
        "endpoint": "/v1/completions",
        "tier_asked": "default",
        "tier_served": "default",
        "num_prompt": 10,
        "num_output": 5,
        "duration_ms": 12.5,
        "status": "ok",
        "billed": True,
        "met": True,
        "price_input": 1.0,
        "price_output": 2.0,
    }
    made = Record(id=name, **{**usual, **fields})
    prices = Prices(made.price_input, made.price_output)
    cost = prices.cost_nano(made.num_prompt, made.num_output, made.multiplier)
    return made if not made.billed or made.cost_nano else replaced(made, cost_nano=cost)


def replaced(made: Record, **changes: Any) -> Record:
    return Record(**{**{n: getattr(made, n) for n in made.__struct_fields__}, **changes})


# --- databases ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own, reachable through a socket in its folder alone."""
    initdb = find_initdb()
    if initdb is None:
        reason = "PostgreSQL is not installed; `make database` installs it on Debian and Ubuntu."
        (pytest.fail if os.environ.get("NITSUM_NEED_DATABASE") else pytest.skip)(reason)
    # PostgreSQL refuses to run as root.
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, "nobody", "nogroup")
        yield from run_postgres(initdb, folder, user)


def find_initdb() -> Path | None:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found)
    return max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)


def run_postgres(initdb: Path, folder: Path, user: dict[str, Any]) -> Iterator[str]:
    data = folder / "data"
    begin = [initdb, "-D", data, "-U", "ledger", "--auth=trust", "--encoding=UTF8", "--no-sync"]
    subprocess.run(begin, check=True, capture_output=True, cwd=folder, **user)
    control = [initdb.resolve().with_name("pg_ctl"), "-D", data, "-w"]
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    log = ["-l", folder / "log", "-o", options]
    subprocess.run([*control, *log, "start"], check=True, capture_output=True, cwd=folder, **user)
    try:
        yield f"postgresql://ledger@/postgres?host={folder}"
    finally:
        stop = [*control, "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, capture_output=True, cwd=folder, **user)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        made = Store(str(tmp_path / "sub" / "ledger.db"))
    else:
        made = Store(request.getfixturevalue("postgres"))
    assert made.engine.dialect.name == request.param
    with made.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM nitsum_ledger")
        connection.exec_driver_sql("DELETE FROM nitsum_runs")
    yield made
    made.close()


def test_records_come_back_as_they_were(store: Store) -> None:
    full = record(
        "b",
        chain_id="größer 漢",
        batch_id="batch_1",
        queue_ms=0.1,
        ttft_ms=1 / 3,
        tpot_ms=None,
        met=None,
        cost_nano=2**60,
        num_prompt=2**40,
    )
    store.write([full, record("a")])
    assert list(store.records()) == [record("a"), full]


def test_a_record_is_stored_once(store: Store) -> None:
    store.write([record("a"), record("b")])
    store.write([record("b", num_output=99), record("c")])
    assert [r.id for r in store.records()] == ["a", "b", "c"]
    assert {r.num_output for r in store.records()} == {5}


def test_what_keys_have_spent(store: Store) -> None:
    store.write([record("a"), record("b", credit_nano=7), record("c", key_id="other")])
    one = record("a").cost_nano
    assert store.spent_nano() == {"k": 2 * one - 7, "other": one}


def test_runs_are_seen(store: Store) -> None:
    store.see(RUN)
    store.see(replaced_run(seen_ms=3_600_000))
    (run,) = store.runs()
    assert (run.started_ms, run.seen_ms) == (0, 3_600_000)


def replaced_run(**changes: Any) -> Run:
    return Run(**{**{n: getattr(RUN, n) for n in RUN.__struct_fields__}, **changes})


def test_usage_by_bucket_and_group(store: Store) -> None:
    store.write(
        [
            record("a", at_ms=100_000),
            record("b", at_ms=159_999, tier_served="flex", batch_id="batch_1", num_cached=3),
            record("c", at_ms=160_000),
            record("d", at_ms=99_999),
            record("e", at_ms=100_000, billed=False),
            record("f", at_ms=100_000, tenant="other"),
        ]
    )
    query = UsageQuery(100, 1000, 60, 10, ("service_tier", "batch"), tenant="t")
    found = read_usage(store, query)
    assert sorted(found) == [100, 160]
    groups = {s.groups["service_tier"]: s for s in found[100]}
    assert (groups["default"].num_requests, groups["default"].groups["batch"]) == (1, False)
    assert (groups["flex"].num_cached, groups["flex"].groups["batch"]) == (3, True)
    (total,) = read_usage(store, UsageQuery(100, 1000, 60, 1))[100]
    assert (total.num_requests, total.num_input, total.num_output) == (3, 30, 15)


@pytest.mark.parametrize("where", ["oracle://x/y", "nonsense://", "sqlite:////nowhere/at/all.db"])
def test_a_ledger_that_cannot_be_opened(where: str) -> None:
    with pytest.raises(LedgerError):
        Store(where)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_passwords_are_not_told(scheme: str) -> None:
    with pytest.raises(LedgerError, match=r"cannot be opened|needs the package") as caught:
        Store(f"{scheme}://me:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(caught.value)


# --- the writer -----------------------------------------------------------------------------------


class ShakyStore(Store):
    """Fails as often as told."""

    def __init__(self, path: Path, num_failures: int) -> None:
        super().__init__(str(path))
        self.num_failures = num_failures

    def write(self, records: Sequence[Record]) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise OperationalError("insert", {}, Exception("the disk is full"))
        super().write(records)


def stored(path: Path) -> list[str]:
    store = Store(str(path))
    try:
        return [r.id for r in store.records()]
    finally:
        store.close()


def test_everything_is_stored_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    writer = LedgerWriter(Store(str(path)), new_run(1, "cpu"), tmp_path)
    writer.start()
    threads = [
        threading.Thread(target=lambda n=n: [writer.add(record(f"{n}-{i}")) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.flush()
    writer.add(record("last"))
    writer.close()
    assert len(stored(path)) == 801
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_database_that_comes_back_gets_everything(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    writer = LedgerWriter(ShakyStore(path, 1), new_run(1, "cpu"), tmp_path)
    writer.start()
    writer.add(record("a"))
    assert writer.flush()
    writer.close()
    assert stored(path) == ["a"]


def test_what_a_dead_database_did_not_take_is_stored_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    writer = LedgerWriter(ShakyStore(path, 10**9), new_run(1, "cpu"), tmp_path)
    writer.start()
    writer.add(record("a"))
    writer.add(record("b"))
    assert not writer.flush(0.1)
    writer.close()
    assert stored(path) == []
    assert len(list(tmp_path.glob("ledger-unsaved-*.jsonl"))) == 1
    again = LedgerWriter(Store(str(path)), new_run(1, "cpu"), tmp_path)
    again.start()
    again.close()
    assert stored(path) == ["a", "b"]
    assert list(tmp_path.glob("*.jsonl")) == []


# --- money ----------------------------------------------------------------------------------------


def test_prices_are_per_million_tokens() -> None:
    assert Prices(3.0, 15.0).cost_nano(1_000_000, 0, 2.0) == 6 * NANO
    assert Prices(3.0, 15.0).cost_nano(1, 1, 1.0) == 18_000


def test_only_what_sells_urgency_gives_credit() -> None:
    tiers = TierSet()
    assert credit_nano(1000, PRIORITY, tiers) == 500
    assert credit_nano(1000, BATCH, tiers) == 0
    assert credit_nano(1000, tiers["default"], tiers) == 0


def test_a_report_by_hand() -> None:
    records = [
        record("a", tier_asked="priority", tier_served="priority", multiplier=2.0),
        record("b", tier_served="priority", multiplier=2.0, met=False, credit_nano=20_000),
        record("c", tier_asked="priority"),
        record("d", status="aborted", met=None),
        record("e", status="refused", billed=False, met=None, tier_asked="priority"),
        record("f", status="error", billed=False, met=None, tenant="u"),
    ]
    runs = [replaced_run(seen_ms=7_200_000), replaced_run(id="r2", started_ms=9_000_000)]
    report = build_report(records, runs, tier_order=("priority", "default"), until_ms=3_600_000)
    priority, default, other = report.lines
    assert (priority.tenant, priority.tier, priority.attainment) == ("t", "priority", 0.5)
    # 10 tokens at 1 and 5 at 2 a million: 20 millionths, twice that as priority.
    assert (priority.cost_nano, priority.credit_nano, priority.flat_nano) == (
        80_000,
        20_000,
        40_000,
    )
    assert (default.num_requests, default.num_refused, default.num_aborted) == (3, 1, 1)
    assert (default.num_prompt_tokens, default.cost_nano, default.num_downgraded) == (20, 40_000, 1)
    assert (other.num_errors, other.cost_nano, other.attainment) == (1, 0, None)
    assert report.gpu_hours == 2.0
    shown = report.as_dict()
    assert shown["revenue_per_gpu_hour"] == pytest.approx(100_000 / NANO / 2)
    assert shown["flat_revenue_per_gpu_hour"] == pytest.approx(80_000 / NANO / 2)
