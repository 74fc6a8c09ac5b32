"""Runs batches: a few lines at a time, through the same routes that clients call.

A line is finished when its result is in the batch's output or error data; nothing else remembers
it. So a server that starts anew goes on with the lines that are in neither.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from starlette.types import ASGIApp

from nitsum.errors import ApiError
from nitsum.server.batches import Batch, BatchStore
from nitsum.server.batchlines import (
    InputLine,
    answered,
    check_lines,
    finished_id,
    lines_of,
    parse_line,
    unanswered,
)
from nitsum.server.datafolder import DataFolder, read_whole_lines
from nitsum.server.files import FileStore
from nitsum.server.inner import InnerResponse, call_inside
from nitsum.server.keyfile import Key
from nitsum.server.keys import KeyRing
from nitsum.server.settings import ServerSettings

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_MAX_RETRY_S = 30.0
_MAX_FAILED_TRIES = 3
"""Of a line that ends in a 5xx that is no "come back later"."""

FindKey = Callable[[str], Key | None]


class BatchWork:
    """Files and batches of one data folder, and the tasks that work on them."""

    def __init__(
        self, folder: DataFolder, app: ASGIApp, find_key: FindKey, num_at_a_time: int
    ) -> None:
        self._folder = folder
        self._app = app
        self._find_key = find_key
        self._num_at_a_time = num_at_a_time
        self._room = asyncio.Semaphore(num_at_a_time)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.files = FileStore(folder)
        self.batches = BatchStore(folder)

    def start(self) -> None:
        """Go on with what an earlier server left."""
        for batch in self.batches.unfinished():
            self._begin(batch)

    async def close(self) -> None:
        """Stop; lines under way are not finished, and run again at the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._folder.close()

    def submit(self, batch: Batch) -> None:
        self.batches.add(batch)
        self._begin(batch)

    def cancel(self, batch: Batch) -> None:
        """Lines under way end without a result."""
        if batch.status == "cancelling":
            return
        self.batches.become(batch, "cancelling")
        if batch.id in self._tasks:
            self._tasks[batch.id].cancel()
        else:
            self._begin(batch)

    def _begin(self, batch: Batch) -> None:
        task = asyncio.create_task(self._run(batch), name=batch.id)
        self._tasks[batch.id] = task
        task.add_done_callback(lambda done: self._tasks.pop(batch.id, None))

    async def _run(self, batch: Batch) -> None:
        try:
            if batch.status == "validating" and not await self._validate(batch):
                return
            if batch.status == "in_progress":
                await self._run_lines(batch)
        except asyncio.CancelledError:
            if batch.status != "cancelling":
                raise  # the server ends, the batch does not
        except Exception:
            _log.exception("Batch %s stopped; the next start goes on with it.", batch.id)
            return
        await asyncio.to_thread(self._finish, batch)

    async def _validate(self, batch: Batch) -> bool:
        path = self._folder.data_path(batch.input_file_id)
        batch.num_lines, batch.errors = await asyncio.to_thread(check_lines, path, batch.endpoint)
        self.batches.become(batch, "failed" if batch.errors else "in_progress")
        return not batch.errors

    async def _run_lines(self, batch: Batch) -> None:
        results = Results(batch, self._folder)
        try:
            async with asyncio.timeout(batch.expires_at - time.time()):
                todo = results.open_lines(self._folder.data_path(batch.input_file_id))
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._num_at_a_time):
                        group.create_task(self._take_lines(batch, todo, results))
            status = "finalizing"
        except TimeoutError:
            results.close()
            results = Results(batch, self._folder)  # without the lines that were under way
            for line in results.open_lines(self._folder.data_path(batch.input_file_id)):
                text = "The batch's time was over before this line ran."
                results.add(False, unanswered(line.custom_id, "batch_expired", text))
            status = "expired"
        finally:
            results.close()
        if status == "expired":
            batch.reached["expired"] = int(time.time())
        self.batches.become(batch, "finalizing")

    async def _take_lines(self, batch: Batch, todo: Iterator[InputLine], results: Results) -> None:
        for line in todo:
            async with self._room:
                response = await self._answer(batch, line)
            text = answered(
                line.custom_id,
                response.status,
                response.headers.get("x-request-id", ""),
                response.body,
            )
            results.add(response.status == 200, text)

    async def _answer(self, batch: Batch, line: InputLine) -> InnerResponse:
        """The line's response; comes back for as long as the server says "later"."""
        body = msgspec.json.encode(line.body)
        num_failed = 0
        wait_s = _RETRY_S
        while True:
            try:
                known = {"nitsum.batch_id": batch.id, "nitsum.key": self._find_key(batch.key_id)}
            except ApiError as error:
                return InnerResponse(error.status, {}, msgspec.json.encode(error.body()))
            response = await call_inside(self._app, batch.endpoint, body, known)
            num_failed += response.status >= 500 and response.status != 503
            if not _comes_back(response) or num_failed >= _MAX_FAILED_TRIES:
                return response
            wait_s = min(max(wait_s, _told_s(response)), _MAX_RETRY_S)
            await asyncio.sleep(wait_s)
            wait_s *= 2

    def _finish(self, batch: Batch) -> None:
        """Publish the results. Doing it twice changes nothing."""
        results = Results(batch, self._folder)
        results.close()
        for file_id, what, count in (
            (batch.output_id, "output", batch.num_completed),
            (batch.error_id, "error", batch.num_failed),
        ):
            if count:
                name = f"{batch.id}_{what}.jsonl"
                self.files.publish(file_id, batch.tenant, name, "batch_output")
            else:
                self._folder.remove_file(file_id)
        if batch.status == "cancelling":
            self.batches.become(batch, "cancelled")
        else:
            self.batches.become(batch, "expired" if "expired" in batch.reached else "completed")


def open_work(settings: ServerSettings, keys: KeyRing | None, app: ASGIApp) -> BatchWork | None:
    """The work of the settings' folder, begun; None where there is none to be had."""
    if settings.data_dir is None:
        return None
    folder = DataFolder(settings.data_dir)
    try:
        if not folder.open():
            _log.warning("%s is used by another server: no files and batches here.", folder.path)
            return None
    except OSError as error:
        _log.warning("No files and batches: %s cannot be used (%s).", folder.path, error.strerror)
        return None
    work = BatchWork(folder, app, _key_finder(keys), settings.batch_concurrency)
    work.start()
    return work


def _key_finder(keys: KeyRing | None) -> FindKey:
    def find(key_id: str) -> Key | None:
        return keys.get(key_id) if keys is not None and key_id else None

    return find


class Results:
    """The output and error data of a batch, open for appending; counts what they hold."""

    def __init__(self, batch: Batch, folder: DataFolder) -> None:
        self._batch = batch
        paths = [folder.data_path(batch.output_id), folder.data_path(batch.error_id)]
        found = [read_whole_lines(path) for path in paths]
        batch.num_completed, batch.num_failed = (len(lines) for lines in found)
        self._done = {finished_id(line) for lines in found for line in lines}
        self._files = [path.open("ab") for path in paths]

    def open_lines(self, path: Path) -> Iterator[InputLine]:
        """Lines of the input without a result, in order; each is handed out once."""
        for _, line in lines_of(path):
            parsed = parse_line(line)
            if parsed.custom_id not in self._done:
                self._done.add(parsed.custom_id)
                yield parsed

    def add(self, good: bool, line: bytes) -> None:
        file = self._files[0 if good else 1]
        file.write(line)
        file.flush()
        if good:
            self._batch.num_completed += 1
        else:
            self._batch.num_failed += 1

    def close(self) -> None:
        for file in self._files:
            os.fsync(file.fileno())
            file.close()


def _comes_back(response: InnerResponse) -> bool:
    """Whether another try may end otherwise."""
    if response.headers.get("x-should-retry") == "false":
        return False
    return response.status == 429 or response.status >= 500


def _told_s(response: InnerResponse) -> float:
    return float(response.headers.get("retry-after-ms", "0")) / 1000
