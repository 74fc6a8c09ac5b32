"""The engine as a process: workers below, the server above, one loop between them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import ceil
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import zmq
from msgspec.structs import replace as replace_fields

from nitsum.clock import MonotonicClock
from nitsum.config import EngineConfig
from nitsum.engine.core import Core
from nitsum.engine.guess import first_guess, given_cost, guess_words
from nitsum.engine.intake import max_request_tokens
from nitsum.engine.ipc import ServerLink
from nitsum.engine.launch import max_model_len, num_host_units
from nitsum.engine.process_executor import ProcessExecutor
from nitsum.engine.steering import controller_of, decisions_of
from nitsum.engine.tally import Tally, plan_memory_bytes
from nitsum.errors import NitsumError, WorkerDied
from nitsum.events import FileSink, NullSink
from nitsum.garbage import IdleCollector, collect_when_told
from nitsum.kv.cache import ArenaShape
from nitsum.messages import (
    Abort,
    Drain,
    EngineFailed,
    EngineProgress,
    EngineReady,
    EngineStart,
    GetStatus,
    Ready,
    Submit,
    SwitchPlan,
    ToEngine,
    encode,
    engine_start_decoder,
)
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import DTYPE_BYTES, SPAWN

IDLE_WAIT_MS = 500
"""Longest sleep of an idle engine; dead workers and a dead parent are noticed this soon."""
BUSY_WAIT_MS = 50
MESSAGES_A_TURN = 8
"""From the server: to take a long prompt in takes half a millisecond, and steps wait for turns."""


class EngineProcess:
    """A handle on the engine process, for whoever starts it."""

    def __init__(self, config: EngineConfig, shape: ModelShape, address: str) -> None:
        """Start it; `address` is where it will bind for the server."""
        self._connection, theirs = SPAWN.Pipe()
        self.process: SpawnProcess = SPAWN.Process(
            target=run, args=(config, shape, address, theirs), name="nitsum-engine"
        )
        self.process.start()
        theirs.close()

    def wait_ready(self, on_progress: Callable[[str], None]) -> EngineReady:
        """Until all workers are warm. Raises `NitsumError` with what went wrong instead."""
        while True:
            match self._receive():
                case EngineReady() as ready:
                    return ready
                case EngineProgress(sentence):
                    on_progress(sentence)
                case EngineFailed(message):
                    self.stop()
                    raise NitsumError(message)

    def _receive(self) -> EngineStart:
        wait([self._connection, self.process.sentinel])
        try:
            return engine_start_decoder.decode(self._connection.recv_bytes())
        except EOFError:
            return EngineFailed("The engine process ended before it was ready; see its output.")

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine and its workers; safe to call twice."""
        self._connection.close()  # the engine sees this, and ends
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def run(config: EngineConfig, shape: ModelShape, address: str, parent: Connection) -> None:
    """The engine process, from start to end."""
    # The parent decides when to end. Ctrl-C reaches the whole group, and service managers send
    # SIGTERM to every process. What we start ignores both, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _run(replace(config, max_model_len=max_model_len(config, shape)), shape, address, parent)
    except NitsumError as error:
        _tell(parent, EngineFailed(str(error)))


def _run(config: EngineConfig, shape: ModelShape, address: str, parent: Connection) -> None:
    def on_progress(sentence: str) -> None:
        _tell(parent, EngineProgress(sentence))

    given = given_cost(config)
    executor = ProcessExecutor(config, shape, on_progress=on_progress)
    sink = FileSink(config.events_path) if config.events_path else NullSink()
    tally = Tally(sink, config.num_ranks, plan_memory_bytes(config, shape))
    try:
        workers = executor.start()
        tally.started(workers)
        cost = first_guess(config, shape, workers[0].driver_name, given)
        on_progress(guess_words(cost, config, workers[0].driver_name))
        arena = arena_of(config, shape, workers)
        controller = controller_of(config, arena, cost)
        core = Core(
            config, arena, executor, MonotonicClock(), tally, controller=controller, cost=cost
        )
        link = ServerLink(address)
        _tell(parent, EngineReady(max_request_tokens(config, arena), workers))
        collect_when_told()
        try:
            loop(core, executor, link, parent, tally)
        finally:
            link.close()
    finally:
        executor.close()


def _tell(parent: Connection, message: EngineStart) -> None:
    with suppress(OSError):  # whoever started us is gone; the loop will notice
        parent.send_bytes(encode(message))


def arena_of(config: EngineConfig, shape: ModelShape, workers: list[Ready]) -> ArenaShape:
    """The arenas as the accounting sees them: as many units as the smallest rank has."""
    geometry = Geometry(shape, config.max_tp, config.min_tp)
    return ArenaShape(
        num_ranks=config.num_ranks,
        num_units=min(ready.num_units for ready in workers),
        units_per_block=geometry.num_units,
        block_tokens=config.block_tokens,
        min_degree=config.plans.degrees[0],
        unit_bytes=geometry.unit_bytes(config.block_tokens, DTYPE_BYTES[config.dtype]),
        num_host_units=num_host_units(config, shape),
    )


def loop(
    core: Core, executor: ProcessExecutor, link: ServerLink, parent: Connection, tally: Tally
) -> None:
    """Until the parent is gone: wait, receive, turn, send."""
    collector = IdleCollector(core.clock.now())
    while True:
        if _wait(core, executor, link, parent):
            return
        for message in link.receive(MESSAGES_A_TURN):
            receive(core, link, message, tally)
        link.send(*core.turn())
        if not core.has_work:
            tally.flush()
            collector.collect(core.clock.now())


def receive(core: Core, link: ServerLink, message: ToEngine, tally: Tally) -> None:
    match message:
        case Submit(request):
            core.submit(request)
        case Abort(request_id):
            core.abort(request_id)
        case SwitchPlan(op_id, plan):
            core.switch(op_id, plan)
        case Drain():
            core.drain()
        case GetStatus(op_id, num_decisions):
            now_s = core.clock.now()
            extra = {
                "now_s": now_s,
                "tally": tally.report(now_s),
                "decisions": decisions_of(core.controller, num_decisions),
            }
            link.send(replace_fields(core.status(op_id), **extra))


def wait_ms(core: Core) -> int:
    """Milliseconds until the core wants a turn whatever happens."""
    if not core.has_work:
        return IDLE_WAIT_MS
    until_s = core.next_turn_s - core.clock.now()
    return BUSY_WAIT_MS if 1000 * until_s >= BUSY_WAIT_MS else ceil(max(0.0, 1000 * until_s))


def _wait(core: Core, executor: ProcessExecutor, link: ServerLink, parent: Connection) -> bool:
    """Sleep until there is something to do; True when the parent has ended."""
    poller = zmq.Poller()
    poller.register(link.socket, zmq.POLLIN)
    poller.register(parent.fileno(), zmq.POLLIN)
    try:
        poller.register(executor.reply_socket, zmq.POLLIN)
    except WorkerDied:
        return False  # the next turn starts new workers
    ready = dict(poller.poll(wait_ms(core)))
    return parent.fileno() in ready
