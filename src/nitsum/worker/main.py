"""A worker process from start to end: load, warm up, report ready, obey.

    engine --- Step, Move, Shutdown (one FIFO) ---> this rank --- Ready, StepDone, ... ---> engine

It dies with its parent, and tells the engine why when it dies of anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TypeVar

import torch
import zmq

from nitsum.errors import NitsumError
from nitsum.garbage import collect_young_only
from nitsum.messages import (
    Failed,
    FromWorker,
    Ready,
    Shutdown,
    WorkerSpec,
    encode,
    to_worker_decoder,
)
from nitsum.model.decoder import Computed, compute
from nitsum.model.interface import KvPages, StepInput
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import Shared
from nitsum.worker.comm import GroupComm
from nitsum.worker.memory import memory_bytes
from nitsum.worker.runner import Runner
from nitsum.worker.weights import ResidentWeights, load_weights, open_source

START_TIMEOUT_S = 900.0
"""How long a rank that is ready waits for one that still loads."""


_T = TypeVar("_T")


def run(spec: WorkerSpec, shared: Shared) -> None:
    """The worker's whole life; ends the process with status 1 after reporting a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the engine ends us
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so do service managers
    _die_with_parent(spec)
    link = EngineLink(spec)
    try:
        (_work if spec.device == "cpu" else _work_on_gpu)(spec, shared, link)
    except Exception as error:
        link.send(Failed(spec.rank, _last_words(error)))
        raise SystemExit(1) from None
    finally:
        link.close()
        if spec.device == "cuda":
            # Groups whose collectives are in graphs cannot be destroyed; the end of the process
            # frees all they hold.
            os._exit(1 if sys.exc_info()[0] else 0)


class EngineLink:
    """The two sockets of a worker: its FIFO in, its replies out."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._replies = self._context.socket(zmq.PUSH)
        self._inbox.rcvhwm = self._replies.sndhwm = 0
        self._inbox.bind(spec.inbox_address)
        self._replies.connect(spec.engine_address)

    def receive(self) -> bytes:
        """The next message of the FIFO; sleeps until there is one."""
        return self._inbox.recv()

    def receive_now(self) -> bytes | None:
        """The next message of the FIFO if one is here."""
        try:
            return self._inbox.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def send(self, reply: FromWorker) -> None:
        self._replies.send(encode(reply))

    def close(self) -> None:
        """Deliver what is sent, waiting two seconds at most."""
        self._context.destroy(linger=2000)


def _work(spec: WorkerSpec, shared: Shared, link: EngineLink) -> None:
    runner, ready = _start(spec, shared)
    collect_young_only()
    link.send(ready)
    while not isinstance(message := to_worker_decoder.decode(link.receive()), Shutdown):
        done = runner.obey(message)
        if done is not None:
            link.send(done)


def _work_on_gpu(spec: WorkerSpec, shared: Shared, link: EngineLink) -> None:
    from nitsum.worker.cuda.symmetric import prepare_environment

    prepare_environment()
    from nitsum.worker.cuda.loop import obey_until_shutdown
    from nitsum.worker.cuda.setup import start

    runner, ready = start(spec, shared)
    collect_young_only()
    link.send(ready)
    obey_until_shutdown(runner, link)


def _start(spec: WorkerSpec, shared: Shared) -> tuple[Runner, Ready]:
    """Load, map and warm up, timing each."""
    torch.set_num_threads(spec.num_threads)
    geometry = Geometry(ModelShape.from_folder(Path(spec.model)), spec.max_tp, spec.min_tp)
    phases: dict[str, float] = {}
    weights = _timed(phases, "load", lambda: _load(spec, geometry))
    runner = _timed(phases, "map", lambda: Runner(spec, geometry, shared, _bind(geometry, weights)))
    _timed(phases, "warm_up", lambda: runner.warm_up(START_TIMEOUT_S))
    memory = memory_bytes(spec, geometry, weights.num_bytes)
    return runner, Ready(spec.rank, spec.num_units, phases, memory)


def _load(spec: WorkerSpec, geometry: Geometry) -> ResidentWeights:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    source = open_source(
        Path(spec.model), geometry.shape, spec.load_format, seed=spec.seed, dtype=dtype
    )
    return load_weights(geometry, spec.rank, source, dtype=dtype)


def _bind(geometry: Geometry, weights: ResidentWeights) -> Callable[..., Computed]:
    """The decoder with the shard that a step's group asks for."""

    def call(step: StepInput, comm: GroupComm, pages: KvPages) -> Computed:
        return compute(geometry, weights.views(comm.degree, comm.shard), comm, pages, step)

    return call


def _timed(phases: dict[str, float], name: str, call: Callable[[], _T]) -> _T:
    started_s = time.monotonic()
    result = call()
    phases[name] = time.monotonic() - started_s
    return result


def _last_words(error: Exception) -> str:
    """A designed error says all; anything else is our mistake, so the log gets the whole trace."""
    if isinstance(error, NitsumError):
        return str(error)
    traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _die_with_parent(spec: WorkerSpec) -> None:
    """A thread sleeps until the parent is gone, however it went, then ends this process.

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started us ends.
    """
    parent = parent_process()
    if parent is not None:
        watch = partial(_exit_after, parent.sentinel, spec)
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _exit_after(sentinel: int, spec: WorkerSpec) -> None:
    """What the parent can no longer clear away, the last rank to get here does."""
    connection.wait([sentinel])
    own, engine = (
        Path(address.removeprefix("ipc://"))
        for address in (spec.inbox_address, spec.engine_address)
    )
    with suppress(OSError):
        own.unlink(missing_ok=True)
        engine.unlink(missing_ok=True)
        own.parent.rmdir()  # refuses while another rank's socket is there
    os._exit(1)
