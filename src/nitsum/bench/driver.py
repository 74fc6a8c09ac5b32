"""The engine without a server: one process that submits, switches and waits.

workers = Workers(config, ...)          processes, started once
driver = workers.driver()               a fresh core over them, or `Driver(config, machine)` over
                                        any other machine, in virtual time for one
driver.submit(...); driver.switch(...)
driver.run()                            until nothing is left; answers in driver.answers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

import zmq
from msgspec import structs

from nitsum.clock import Clock, MonotonicClock
from nitsum.config import EngineConfig
from nitsum.cost.protocol import CostModel
from nitsum.engine.core import Core
from nitsum.engine.executor import Executor
from nitsum.engine.guess import first_guess, given_cost
from nitsum.engine.process import arena_of, wait_ms
from nitsum.engine.process_executor import OnProgress, ProcessExecutor
from nitsum.errors import NitsumError
from nitsum.events import EventSink, NullSink
from nitsum.garbage import collect_as_usual, collect_when_told
from nitsum.kv.cache import ArenaShape
from nitsum.messages import Output, Ready, SwitchReport, Tokens
from nitsum.request import FinishReason, Request
from nitsum.shape import ModelShape

SETTLE_S = 30.0
"""Steps still on their way when the last request has ended are given this long."""


@dataclass
class Answer:
    """What came back for one request so far."""

    request: Request
    tokens: list[int] = field(default_factory=list[int])
    logits: list[bytes] = field(default_factory=list[bytes])
    """float32 [vocabulary] of each token, where the request asked for them."""
    times_s: list[float] = field(default_factory=list[float])
    """When each token was here, on the monotonic clock."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached: int = 0


class Watcher(Protocol):
    """Looks at the core around each turn."""

    def before(self, core: Core) -> None: ...

    def after(self, core: Core) -> None: ...


class Machine(Protocol):
    """What a core runs on: ranks, their memory, and how time passes."""

    @property
    def executor(self) -> Executor: ...

    @property
    def arena(self) -> ArenaShape: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def cost(self) -> CostModel:
        """A first guess at step times."""
        ...

    def wait(self, core: Core) -> None:
        """Until a rank has replied, or the core wants a turn whatever happens."""
        ...


class Workers:
    """Running worker processes; cores over them come and go, one at a time."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        """Starts them; raises what `ProcessExecutor.start` raises."""
        self.config = config
        self.shape = ModelShape.from_folder(Path(config.model))
        given = given_cost(config)
        self.executor = ProcessExecutor(config, self.shape, on_progress=on_progress)
        try:
            self.ready: list[Ready] = self.executor.start()
        except BaseException:
            self.executor.close()
            raise
        self.arena: ArenaShape = arena_of(config, self.shape, self.ready)
        self.clock = MonotonicClock()
        self.cost = first_guess(config, self.shape, self.ready[0].driver_name, given)
        self._driver: Driver | None = None

    def driver(
        self,
        config: EngineConfig | None = None,
        sink: EventSink | None = None,
        watcher: Watcher | None = None,
    ) -> Driver:
        """A core that knows nothing of those before it.

        `config` may differ from the workers' in what only the engine reads: the initial plan, the
        prefix cache, tiers. The driver before must have run to its end.
        """
        if self._driver is not None:
            self._driver.settle()
        self._driver = Driver(config or self.config, self, sink, watcher)
        collect_when_told()  # as the engine's process does
        return self._driver

    def wait(self, core: Core) -> None:
        poller = zmq.Poller()
        poller.register(self.executor.reply_socket, zmq.POLLIN)
        poller.poll(wait_ms(core))

    def close(self) -> None:
        self.executor.close()
        collect_as_usual()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Driver:
    """A core, and what it said."""

    def __init__(
        self,
        config: EngineConfig,
        machine: Machine,
        sink: EventSink | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.machine = machine
        self.clock = machine.clock
        self.core = Core(
            config,
            machine.arena,
            machine.executor,
            self.clock,
            sink or NullSink(),
            cost=machine.cost,
        )
        self.answers: dict[str, Answer] = {}
        self.reports: list[SwitchReport] = []
        self._watcher = watcher
        self._something_new = False

    def submit(self, request: Request) -> None:
        """Submit it; unless it says otherwise, it arrives now."""
        if not request.arrival_s:
            request = structs.replace(request, arrival_s=self.clock.now())
        self.answers[request.request_id] = Answer(request)
        self.core.submit(request)
        self._something_new = True

    def switch(self, plan: str) -> None:
        """Ask for a plan; its report joins `reports` when the switch has ended."""
        self.core.switch(f"switch-{len(self.reports)}", plan)
        self._something_new = True

    def turn(self) -> None:
        """Sleep until a worker has replied, unless there is something new; then one turn."""
        if not self._something_new:
            self._wait()
        self._something_new = False
        if self._watcher is not None:
            self._watcher.before(self.core)
        messages = self.core.turn()
        if self._watcher is not None:
            self._watcher.after(self.core)
        now_s = self.clock.now()
        for message in messages:
            if isinstance(message, SwitchReport):
                self.reports.append(message)
            elif isinstance(message, Output):
                self._take(message, now_s)
            elif isinstance(message, Tokens):
                self._take_tokens(message, now_s)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Turn until `until` says so, or until nothing is left to do."""
        while self.core.has_work and not (until is not None and until()):
            self.turn()

    def settle(self) -> None:
        """Until no step is on its way; raises `NitsumError` when one never comes back."""
        self.run()
        deadline_s = self.clock.now() + SETTLE_S
        while self.core.generation.in_flight:
            if self.clock.now() > deadline_s:
                raise NitsumError(f"A step did not end within {SETTLE_S:g} s of the last answer.")
            self.turn()

    @property
    def num_active(self) -> int:
        """Requests that have not ended."""
        return len(self.core.sequences)

    @property
    def is_switching(self) -> bool:
        return self.core.status("driver").switching_to is not None

    def _wait(self) -> None:
        self.machine.wait(self.core)

    def _take_tokens(self, message: Tokens, now_s: float) -> None:
        for request_id, token in zip(message.request_ids, message.tokens, strict=True):
            answer = self.answers[request_id]
            answer.tokens.append(token)
            answer.times_s.append(now_s)

    def _take(self, output: Output, now_s: float) -> None:
        answer = self.answers[output.request_id]
        answer.tokens.extend(output.tokens)
        answer.logits.extend(output.logits)
        answer.times_s.extend([now_s] * len(output.tokens))
        answer.num_cached = max(answer.num_cached, output.num_cached)
        answer.finish_reason = output.finish_reason or answer.finish_reason
        answer.error = output.error or answer.error
