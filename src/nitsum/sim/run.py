"""The real engine on a virtual clock: from one event to the next, as fast as it can be decided.

    while something is to come:
        advance the clock to the next of {arrival, reply of a rank, planned switch, tick}
        submit what arrived; let the engine take a turn; start the next calls of chains

Between two events nothing can change, so nothing is skipped. Equal arguments give equal events.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from nitsum.clock import VirtualClock
from nitsum.control.controller import Controller
from nitsum.engine.core import Core
from nitsum.engine.steering import new_controller
from nitsum.errors import NitsumError
from nitsum.events import AnyEvent, BothSinks, EventSink, SwitchStarted
from nitsum.messages import FromEngine, Output, SwitchReport
from nitsum.metrics.records import Recorder
from nitsum.metrics.report import Report, build_report
from nitsum.metrics.targets import Targets
from nitsum.sim.executor import HOST_LATENCY_S, SimExecutor
from nitsum.sim.feed import Feed
from nitsum.sim.system import System
from nitsum.sim.threshold import Threshold
from nitsum.workload.items import WorkItem

TICK_S = 0.5
"""How often the engine gets a turn although nothing happened, and the arena is looked at."""
_STUCK_S = 3600.0


class PlannedSwitch(NamedTuple):
    """Go to `plan` at `at_s` of the run."""

    at_s: float
    plan: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is run; none of it says what is served."""

    host_latency_s: float = HOST_LATENCY_S
    front_door_s: float = 0.0
    """From a request's arrival to the engine: tokenizing, and a message between processes."""
    noise: float = 0.0
    seed: int = 0
    """Of the noise."""
    drain_s: float = 600.0
    """How long after the last arrival the run may go on; what is left then counts as missed."""
    switches: tuple[PlannedSwitch, ...] = ()
    switch_cost_s: float = 0.0
    """Every rank stands still so long when a switch starts, beside what its moves take."""


@dataclass
class SimResult:
    """What a run was like; `recorder` holds every request, step and switch."""

    system: System
    recorder: Recorder
    reports: list[SwitchReport] = field(default_factory=list[SwitchReport])
    sim_s: float = 0.0
    """Virtual seconds."""
    cpu_s: float = 0.0
    """Of the one core that simulated."""
    num_turns: int = 0
    num_submitted: int = 0
    num_unfinished: int = 0
    busy_share: list[float] = field(default_factory=list[float])
    """Per rank: time in steps and moves, waiting for peers not counted, over the whole run."""
    arena_mean_share: float = 0.0
    """Of the fullest rank's arena, in use by requests, over the time that requests were there."""
    arena_max_share: float = 0.0

    def report(
        self, targets: Targets | None, *, warmup_s: float = 0.0, small_samples: bool = False
    ) -> Report:
        """`build_report` of the run, which knows what model it was."""
        return build_report(
            self.recorder,
            targets=targets,
            warmup_s=warmup_s,
            small_samples=small_samples,
            work_of=self.system.work_of,
        )

    @property
    def speedup(self) -> float:
        """Virtual seconds per second of one core."""
        return self.sim_s / self.cpu_s if self.cpu_s > 0 else 0.0


Progress = Callable[[float, int], None]
"""Called now and then with the virtual time and the number of unfinished requests."""


class Simulation:
    """One run of one system over one workload."""

    def __init__(
        self,
        system: System,
        items: Iterable[WorkItem],
        *,
        targets: Targets | None = None,
        options: Options | None = None,
        sink: EventSink | None = None,
    ) -> None:
        self.system = system
        self.options = options or Options()
        self.clock = VirtualClock()
        self.recorder = Recorder()
        self.executor = SimExecutor(
            system.arena,
            system.cost,
            self.clock,
            host_latency_s=self.options.host_latency_s,
            noise=self.options.noise,
            seed=self.options.seed,
            copies_beside=system.config.device == "cuda",
        )
        every_sink = self.recorder if sink is None else BothSinks(self.recorder, sink)
        if self.options.switch_cost_s:
            every_sink = BothSinks(every_sink, _Toll(self.executor, self.options.switch_cost_s))
        self.core = Core(
            system.config,
            system.arena,
            self.executor,
            self.clock,
            every_sink,
            controller=controller_of(system) if system.steers else None,
            cost=system.cost,
        )
        self.feed = Feed(items, system.arena.block_tokens, targets, self.options.front_door_s)
        self.result = SimResult(system, self.recorder)
        self._switches = sorted(self.options.switches)
        self._num_switches = 0
        self._tick_s = 0.0
        self._arena_shares: list[float] = []
        self._progress_s = 0.0
        self._threshold = Threshold(self.core, system) if system.threshold_tokens else None

    def run(self, progress: Progress | None = None) -> SimResult:
        """To the end: everything answered, or `drain_s` over.

        Raises `SimulationStuck` when requests wait although nothing is under way.
        """
        started_s = time.process_time()
        with _rare_collections():
            self._run(progress)
        self._sum_up(time.process_time() - started_s)
        return self.result

    def _run(self, progress: Progress | None) -> None:
        while (at_s := self._next_s()) < float("inf"):
            if self.feed.next_s == float("inf") and at_s > self._last_s:
                break
            self.clock.advance_to(max(at_s, self.clock.now()))
            self._turn()
            if progress is not None and self.clock.now() >= self._progress_s:
                self._progress_s = self.clock.now() + 1.0
                progress(self.clock.now(), len(self.core.sequences))

    # -- one event --

    @property
    def _last_s(self) -> float:
        return self.feed.last_arrival_s + self.options.drain_s

    def _next_s(self) -> float:
        at_s = min(self.feed.next_s, self.executor.next_reply_s)
        if self._num_switches < len(self._switches):
            at_s = min(at_s, self._switches[self._num_switches].at_s)
        return min(at_s, self._tick_s, self.core.next_turn_s) if self.core.has_work else at_s

    def _turn(self) -> None:
        now = self.clock.now()
        for item, request in self.feed.due(now):
            self.core.submit(request)
            sequence = self.core.sequences.get(request.request_id)
            if sequence is not None:
                self.feed.sent(item, sequence)
        self._switch(now)
        self._hear(self.core.turn(), now)
        self.result.num_turns += 1
        if now >= self._tick_s:
            self._tick(now)

    def _switch(self, now: float) -> None:
        while self._num_switches < len(self._switches):
            switch = self._switches[self._num_switches]
            if switch.at_s > now:
                return
            self._num_switches += 1
            self.core.switch(f"switch-{self._num_switches}", switch.plan)

    def _hear(self, messages: list[FromEngine], now: float) -> None:
        for message in messages:
            if isinstance(message, Output):
                if message.finish_reason is not None:
                    self.feed.answered(message.request_id, now)
            elif isinstance(message, SwitchReport):
                self.result.reports.append(message)

    def _tick(self, now: float) -> None:
        self._tick_s = now + TICK_S
        kv = self.core.generation.kv
        shares = [kv.used_share(rank) for rank in range(self.system.arena.num_ranks)]
        self._arena_shares.append(max(shares))
        if self._threshold is not None:
            self._threshold.look(self.recorder)
        if now - self.core.last_step_s > _STUCK_S and self.core.sequences:
            raise SimulationStuck(now, len(self.core.sequences))

    def _sum_up(self, cpu_s: float) -> None:
        result, now = self.result, self.clock.now()
        result.sim_s, result.cpu_s = now, cpu_s
        result.num_submitted = self.feed.num_submitted
        result.num_unfinished = len(self.core.sequences)
        result.busy_share = [busy / now if now else 0.0 for busy in self.executor.busy_s]
        shares = self._arena_shares
        result.arena_mean_share = sum(shares) / len(shares) if shares else 0.0
        result.arena_max_share = max(shares, default=0.0)


class _Toll:
    """Takes a fixed price for every switch."""

    def __init__(self, executor: SimExecutor, seconds: float) -> None:
        self.executor = executor
        self.seconds = seconds

    def emit(self, event: AnyEvent) -> None:
        if isinstance(event, SwitchStarted):
            self.executor.stand_still(self.seconds)


@contextmanager
def _rare_collections() -> Generator[None]:
    """Little that a run makes is cyclic, and looking for it is a tenth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def controller_of(system: System) -> Controller:
    """A controller with the usual rules over the system's plans."""
    return new_controller(system.config, system.arena, system.cost)


class SimulationStuck(NitsumError):
    """Requests wait, and nothing under way will ever let them go on."""

    def __init__(self, at_s: float, num_waiting: int) -> None:
        super().__init__(
            f"At {at_s:.0f} s, {num_waiting} requests wait and no lane has run a step for "
            f"{_STUCK_S:.0f} s. This is a fault of the scheduler; please report it with the "
            "command you ran."
        )


def simulate(
    system: System,
    items: Iterable[WorkItem],
    *,
    targets: Targets | None = None,
    options: Options | None = None,
    sink: EventSink | None = None,
    progress: Progress | None = None,
) -> SimResult:
    """Serve `items` with `system` in virtual time; see `Simulation`."""
    simulation = Simulation(system, items, targets=targets, options=options, sink=sink)
    return simulation.run(progress)
