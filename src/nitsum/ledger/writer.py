"""Records on their way to the database: queued by the event loop, written by a thread in batches.

    event loop -- add() --> queue -- thread, every 0.2 s --> database

A database that is away is tried again; what it still has not taken when the server ends goes to a
file, which the next writer stores first. Only a killed process loses what was in the queue: 0.2 s
of records.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from nitsum.ledger.records import Record, Run
from nitsum.ledger.store import Store

_log = logging.getLogger(__name__)

_GATHER_S = 0.2
_MAX_BATCH = 1000
_SEEN_EVERY_S = 30.0
_RETRY_S = 1.0
_CLOSE_TRIES = 3
_UNSAVED = "ledger-unsaved-{}.jsonl"
_decoder = msgspec.json.Decoder(Record)


class LedgerWriter:
    """Owns a store and the thread that writes to it. `add` never blocks."""

    def __init__(self, store: Store, run: Run, folder: Path) -> None:
        """`folder` is where a file for what cannot be stored at the end may be made."""
        self._store = store
        self._run = run
        self._folder = folder
        self._left_over: list[Path] = []
        self._queue: queue.SimpleQueue[Record | threading.Event | None] = queue.SimpleQueue()
        self._pending: list[Record] = []
        self._waiting: list[threading.Event] = []
        self._seen_s = -_SEEN_EVERY_S
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)

    def start(self) -> None:
        self._left_over = sorted(self._folder.glob(_UNSAVED.format("*")))
        for path in self._left_over:
            self._pending += [_decoder.decode(line) for line in path.read_bytes().splitlines()]
        self._thread.start()

    def add(self, record: Record) -> None:
        self._queue.put(record)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until all records added before are stored; False when that takes too long."""
        stored = threading.Event()
        self._queue.put(stored)
        return stored.wait(timeout_s)

    def close(self) -> None:
        """Store what is left and end the thread; returns when nothing can be lost any more."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        self._store.close()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._gather()
            if not self._try_store():
                self._closing.wait(_RETRY_S)
        self._finish()

    def _finish(self) -> None:
        self._drain()
        for attempt in range(_CLOSE_TRIES):
            if self._try_store(ending=True):
                return
            if attempt + 1 < _CLOSE_TRIES:
                time.sleep(_RETRY_S)
        _keep(self._folder / _UNSAVED.format(self._run.id), self._pending)

    def _gather(self) -> None:
        """Sleep until there is something, then a moment more for what comes with it."""
        try:
            self._take(self._queue.get(timeout=_SEEN_EVERY_S if not self._pending else _RETRY_S))
        except queue.Empty:
            return
        if not self._waiting:
            self._closing.wait(_GATHER_S)
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self._take(self._queue.get_nowait())
            except queue.Empty:
                return

    def _take(self, item: Record | threading.Event | None) -> None:
        if isinstance(item, Record):
            self._pending.append(item)
        elif item is not None:
            self._waiting.append(item)

    def _try_store(self, *, ending: bool = False) -> bool:
        """Write what is pending; False when the database did not take it."""
        try:
            self._store_pending()
            if ending or time.monotonic() - self._seen_s >= _SEEN_EVERY_S:
                self._see()
        except Exception as error:  # whatever a driver raises: records must survive it
            _log.error("The ledger cannot be written now, %d wait: %s", len(self._pending), error)
            return False
        for stored in self._waiting:
            stored.set()
        self._waiting.clear()
        return True

    def _store_pending(self) -> None:
        while self._pending:
            batch = self._pending[:_MAX_BATCH]
            self._store.write(batch)
            del self._pending[: len(batch)]
        # Only now: storing a record twice does no harm, losing one would.
        for path in self._left_over:
            path.unlink(missing_ok=True)
        self._left_over = []

    def _see(self) -> None:
        self._store.see(msgspec.structs.replace(self._run, seen_ms=now_ms()))
        self._seen_s = time.monotonic()


def new_run(num_ranks: int, device: str) -> Run:
    now = now_ms()
    run_id = f"run-{uuid.uuid4().hex}"
    return Run(id=run_id, started_ms=now, seen_ms=now, num_ranks=num_ranks, device=device)


def now_ms(clock: Callable[[], float] = time.time) -> int:
    """Unix time."""
    return round(clock() * 1000)


def _keep(path: Path, records: list[Record]) -> None:
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(msgspec.json.encode(record) + b"\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    _log.error(
        "%d records of the ledger are in %s; the next start stores them.", len(records), path
    )
