"""The books of a server: what a key may still have, and one ledger record for each call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nitsum.errors import ApiError
from nitsum.ledger.records import NANO, Prices, Record, Status, credit_nano
from nitsum.ledger.store import Store
from nitsum.ledger.writer import LedgerWriter, new_run
from nitsum.server.caller import now_s
from nitsum.server.job import Job
from nitsum.server.keys import KeyRing
from nitsum.server.quota import Quotas
from nitsum.server.settings import ServerSettings
from nitsum.tier import TierSet


@dataclass
class Books:
    """Opens an entry for each job. Without a writer nothing is recorded."""

    tiers: TierSet
    prices: Prices
    quotas: Quotas
    run_id: str = ""
    writer: LedgerWriter | None = None
    wall_clock: Callable[[], float] = time.time

    store: Store | None = None

    def start(self) -> None:
        if self.writer is not None:
            self.writer.start()

    def close(self) -> None:
        """Blocks until everything is stored."""
        if self.writer is not None:
            self.writer.close()

    def open(self, job: Job) -> Entry:
        """The entry of a job that begins; use it as a context manager."""
        return Entry(self, job)

    def record(self, job: Job, status: Status, error: ApiError | None) -> Record:
        """What a job came to."""
        caller, usage, first = job.caller, job.usage(), job.first_output
        tier = self.tiers[job.tier]
        billed = status == "ok" or (status == "aborted" and usage.completion_tokens > 0)
        counts = (usage.prompt_tokens, usage.completion_tokens)
        cost = self.prices.cost_nano(*counts, tier.price) if billed else 0
        met = job.met_targets() if status == "ok" else None
        duration_s = now_s() - caller.arrival_s
        return Record(
            id=job.id,
            request_id=_clean(caller.request_id),
            run_id=self.run_id,
            at_ms=round((self.wall_clock() - duration_s) * 1000),
            key_id=caller.key.id if caller.key else "",
            tenant=_clean(caller.account),
            model=job.model,
            endpoint=caller.endpoint,
            chain_id=_clean(caller.chain_id) if caller.chain_id else None,
            batch_id=caller.batch_id,
            tier_asked=caller.tier_asked,
            tier_served=tier.name,
            reason=_clean(job.reason) if job.reason else None,
            num_prompt=usage.prompt_tokens,
            num_cached=usage.prompt_tokens_details.cached_tokens,
            num_output=usage.completion_tokens,
            queue_ms=None if first is None else _ms(first.queue_s),
            ttft_ms=_ms(job.ttft_s()),
            tpot_ms=_ms(job.tpot_s()),
            duration_ms=duration_s * 1000,
            ttft_target_ms=_ms(tier.ttft_s),
            tpot_target_ms=_ms(tier.tpot_s),
            deadline_ms=_ms(tier.deadline_s),
            met=met,
            plan=first.plan if first else "",
            lane=first.lane if first else "",
            num_displaced=sum(watch.num_displaced for watch in job.watches),
            status=status,
            error_code=None if error is None else error.code or str(error.status),
            billed=billed,
            price_input=self.prices.input,
            price_output=self.prices.output,
            multiplier=tier.price,
            cost_nano=cost,
            credit_nano=credit_nano(cost, tier, self.tiers) if met is False else 0,
        )


def open_books(settings: ServerSettings, tiers: TierSet, keys: KeyRing | None) -> Books:
    """The books of a server; raises `LedgerError` when its ledger cannot be opened."""
    quotas = Quotas(now_s)
    if keys is not None:
        quotas.quota_of = keys.quota_of
    if not settings.ledger:
        return Books(tiers, settings.prices, quotas)
    store = Store(settings.ledger)
    spent = {key: nano / NANO for key, nano in store.spent_nano().items()}
    run = new_run(settings.num_ranks, settings.device)
    writer = LedgerWriter(store, run, settings.data_dir or Path())
    quotas.spent_before = lambda key_id: spent.get(key_id, 0.0)
    return Books(tiers, settings.prices, quotas, run.id, writer, store=store)


class Entry:
    """From admission to the record; a call that its key has no room for gets a 429 at the start."""

    def __init__(self, books: Books, job: Job) -> None:
        self._books = books
        self._job = job

    def __enter__(self) -> None:
        try:
            self._admit()
        except ApiError as error:
            self._close("refused", error)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._settle()
        self._close(self._status(error), error if isinstance(error, ApiError) else None)

    def _admit(self) -> None:
        caller = self._job.caller
        if caller.key is None:
            return
        if caller.batch_id is not None:
            self._books.quotas.check_budget(caller.key)
        else:
            self._books.quotas.admit(caller.key, self._job.usage().prompt_tokens)

    def _settle(self) -> None:
        caller = self._job.caller
        if caller.key is not None and caller.batch_id is None:
            self._books.quotas.settle(caller.key, self._job.usage().completion_tokens)

    def _status(self, error: BaseException | None) -> Status:
        if self._job.all_ended:
            return "ok"
        if error is None or not isinstance(error, Exception):
            return "aborted"  # closed or cancelled: the client has gone
        if not isinstance(error, ApiError):
            return "error"
        begun = self._job.usage().completion_tokens > 0
        return "refused" if error.status == 429 or (error.status == 503 and not begun) else "error"

    def _close(self, status: Status, error: ApiError | None) -> None:
        books, caller = self._books, self._job.caller
        record = books.record(self._job, status, error)
        if caller.key is not None:
            books.quotas.spend(caller.key, (record.cost_nano - record.credit_nano) / NANO)
        if books.writer is not None:
            books.writer.add(record)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _clean(text: str) -> str:
    """Text that every database takes: no NUL, nothing that is no character."""
    with suppress(UnicodeEncodeError):
        text.encode()
        return text.replace("\0", "")
    return text.encode(errors="replace").decode().replace("\0", "")
