"""`Executor` over real worker processes: ZeroMQ sockets in a private folder, one FIFO a rank.

send: encoded once -+-> PUSH rank 0 -> worker 0 -+-> PULL replies -> poll
                    +-> PUSH rank 1 -> worker 1 -+
"""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import zmq

from nitsum.config import EngineConfig
from nitsum.engine.launch import Generation, launch
from nitsum.errors import WorkerDied
from nitsum.messages import (
    Failed,
    FromWorker,
    Ready,
    Shutdown,
    ToWorker,
    encode,
    from_worker_decoder,
)
from nitsum.shape import ModelShape
from nitsum.shared import Progress

OnProgress = Callable[[str], None]
"""Takes one sentence about the start, for whoever waits for it."""

STUCK_MARGIN = 1.25
"""Workers report a late peer after `timeout_s` themselves and know more; the executor steps in a
little later, when nobody has."""

CLOSE_TIMEOUT_S = 2.0


class ProcessExecutor:
    """Carries messages to worker processes and replies back; made for one thread.

    A failure ends the generation: `poll` and `start` raise `WorkerDied` with all processes gone,
    and `start` may be called again.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: ModelShape,
        *,
        on_progress: OnProgress | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        """`shape` is that of the checkpoint `config.model`; nothing is started yet."""
        self._config = config
        self._shape = shape
        self._on_progress: OnProgress = on_progress or (lambda _sentence: None)
        self._start_timeout_s = start_timeout_s
        self._workers: _Workers | None = None

    def start(self) -> list[Ready]:
        """Start a fresh generation, ending the old one; returns by rank, when all are warm.

        Raises `WorkerDied` with a worker's own words, `MissingDependency`, `ConfigError`.
        """
        self.close()
        num_ranks = self._config.num_ranks
        self._on_progress(f"Starting {num_ranks} worker(s).")
        started_s = time.monotonic()
        workers = self._workers = _Workers(self._config, self._shape)
        ready: dict[int, Ready] = {}
        while len(ready) < num_ranks:
            if time.monotonic() - started_s > self._start_timeout_s:
                late = sorted(set(range(num_ranks)) - set(ready))
                self._die(f"rank(s) {late} were not ready after {self._start_timeout_s:g} s.")
            for reply in self.poll(1.0):
                assert isinstance(reply, Ready), reply
                ready[reply.rank] = reply
                after_s = time.monotonic() - started_s
                self._on_progress(ready_sentence(reply, len(ready), num_ranks, after_s))
        workers.connect()
        return [ready[rank] for rank in range(num_ranks)]

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        self._running().send(ranks, message)

    def num_sent(self, rank: int) -> int:
        return self._running().num_sent[rank]

    def poll(self, timeout_s: float) -> list[FromWorker]:
        workers = self._running()
        replies, someone_ended = workers.receive(timeout_s)
        for reply in replies:
            if isinstance(reply, Failed):
                self._die(f"rank {reply.rank}: {reply.message}")
        if someone_ended:
            self._die(workers.epitaph())
        stuck = workers.stuck_rank(STUCK_MARGIN * self._config.timeout_s)
        if stuck is not None:
            self._die(f"rank {stuck} completed nothing for {self._config.timeout_s:g} s.")
        return replies

    @property
    def reply_socket(self) -> zmq.Socket[bytes]:
        """Readable when a reply is here; a new generation has a new one."""
        return self._running().replies

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _running(self) -> _Workers:
        if self._workers is None:
            raise WorkerDied("no workers are running; start() them first.")
        return self._workers

    def _die(self, reason: str) -> NoReturn:
        workers, self._workers = self._running(), None
        workers.kill()
        raise WorkerDied(f"A worker ended: {reason}")


def ready_sentence(ready: Ready, num_ready: int, num_ranks: int, after_s: float) -> str:
    """With how long each part of its start took; `process` is until the first that it timed."""
    parts = {"process": max(0.0, after_s - sum(ready.phases.values())), **ready.phases}
    words = ", ".join(f"{name.replace('_', ' ')} {took_s:.1f}" for name, took_s in parts.items())
    return (
        f"Rank {ready.rank} is ready after {after_s:.1f} s ({num_ready} of {num_ranks}): {words}."
    )


class _Workers:
    """One generation: its processes, sockets, and how far each rank has come."""

    def __init__(self, config: EngineConfig, shape: ModelShape) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nitsum-"))
        self._context = zmq.Context[zmq.Socket[bytes]]()
        try:
            self.replies = self._context.socket(zmq.PULL)
            self.replies.rcvhwm = 0
            self.replies.bind(f"ipc://{self._folder}/engine")
            self._generation: Generation = launch(config, shape, self._folder)
        except BaseException:
            self._close_sockets()
            raise
        num_ranks = config.num_ranks
        self.num_sent = [0] * num_ranks
        self._inboxes: list[zmq.Socket[bytes]] = []
        self._progress = Progress(self._generation.shared.progress)
        self._seen = [0] * num_ranks
        self._seen_s = [time.monotonic()] * num_ranks
        self._poller = zmq.Poller()
        self._poller.register(self.replies, zmq.POLLIN)
        for process in self._generation.processes:
            self._poller.register(process.sentinel, zmq.POLLIN)

    def connect(self) -> None:
        """Open the FIFOs of ranks that are ready to read them."""
        for spec in self._generation.specs:
            inbox = self._context.socket(zmq.PUSH)
            inbox.sndhwm = 0
            inbox.connect(spec.inbox_address)
            self._inboxes.append(inbox)

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        encoded = encode(message)
        for rank in ranks:
            if self._progress.completed(rank) == self.num_sent[rank]:
                self._seen_s[rank] = time.monotonic()  # idle until now, hence not stuck
            self._inboxes[rank].send(encoded, zmq.NOBLOCK)
            self.num_sent[rank] += 1

    def receive(self, timeout_s: float) -> tuple[list[FromWorker], bool]:
        """Replies that are here, and whether a process has ended."""
        events = self._poller.poll(math.ceil(timeout_s * 1000))
        ended = any(source is not self.replies for source, _ in events)
        if ended:
            time.sleep(0.05)  # its last words may still be on their way through the socket
        return list(self._take_replies()), ended

    def _take_replies(self) -> Iterator[FromWorker]:
        while True:
            try:
                yield from_worker_decoder.decode(self.replies.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def stuck_rank(self, limit_s: float) -> int | None:
        """A rank that has work and completed nothing for `limit_s`."""
        now_s = time.monotonic()
        for rank, num_sent in enumerate(self.num_sent):
            completed = self._progress.completed(rank)
            if completed != self._seen[rank]:
                self._seen[rank], self._seen_s[rank] = completed, now_s
            elif completed < num_sent and now_s - self._seen_s[rank] > limit_s:
                return rank
        return None

    def epitaph(self) -> str:
        """How the processes that ended did so."""
        ended = [process for process in self._generation.processes if process.exitcode is not None]
        return ", ".join(f"{process.name} {_ending(process.exitcode)}" for process in ended) + "."

    def close(self) -> None:
        """Ask, wait a little, then insist."""
        if self._inboxes:
            self.send(range(len(self._inboxes)), Shutdown())
            deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
            for process in self._generation.processes:
                process.join(max(0.0, deadline_s - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every process now and release all that the generation held."""
        for process in self._generation.processes:
            process.kill()
        for process in self._generation.processes:
            process.join()
            process.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        hint = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-exit_code).name}{hint}"
    return f"exited with status {exit_code}"
