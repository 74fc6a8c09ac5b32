"""The engine: receive, decide, dispatch, collect, commit.

    turn():  collect   replies of the workers: tokens become known, steps end, moves are done
             dispatch  every lane whose ranks can take a step gets the one its scheduler composes
             switch    the plan change under way goes on, if there is one, while ranks are busy

A lane's next step is sent before the last one's tokens are here: drawn tokens stay on the workers
and feed the next step, and the host learns them one step later.

The core does no input or output of its own. Requests come in through `submit`, `abort` and
`switch`, replies through the executor, time through the clock; what it has to say, `turn` returns.
"""

from __future__ import annotations

from contextlib import suppress
from math import inf

from nitsum.clock import Clock
from nitsum.config import EngineConfig
from nitsum.control.controller import Controller
from nitsum.cost.correct import CorrectedCost
from nitsum.cost.protocol import CostModel, FixedCost
from nitsum.engine.commit import Committer, extend_hashes
from nitsum.engine.executor import Executor
from nitsum.engine.generation import Generation, Memory
from nitsum.engine.intake import check_request, max_request_tokens
from nitsum.engine.lanes import LaneLoop, StepInFlight
from nitsum.engine.notes import emit_arrived, emit_sent, note_changes
from nitsum.engine.outputs import Outbox, error_output
from nitsum.engine.status import status_of
from nitsum.engine.steering import Steering
from nitsum.errors import ApiError, ConfigError, SwitchRefused, WorkerDied
from nitsum.events import (
    BothSinks,
    EventSink,
    GenerationStarted,
    RankTimed,
    Refused,
    Started,
)
from nitsum.garbage import collect_unless_python_does
from nitsum.kv.cache import ArenaShape
from nitsum.kv.check import check
from nitsum.messages import (
    FromEngine,
    FromWorker,
    MoveDone,
    Status,
    StepDone,
    StepsTimed,
    SwitchReport,
)
from nitsum.request import Request
from nitsum.sched.admission import queue_timeout
from nitsum.sched.alarms import Alarms
from nitsum.sched.composed import Composed
from nitsum.sequence import SeqState, Sequence
from nitsum.tier import TierSet

PORTION_S = 6e-3
"""From one portion of a switch to the next: copies leave the steps beside them their bandwidth."""
START_ATTEMPTS = 3
"""Tries to start a new generation of workers before the engine gives up and says so."""


class Core:
    """Lane loops over one executor."""

    def __init__(
        self,
        config: EngineConfig,
        arena: ArenaShape,
        executor: Executor,
        clock: Clock,
        sink: EventSink,
        controller: Controller | None = None,
        cost: CostModel | None = None,
    ) -> None:
        """`cost` is a first guess; what steps really take corrects it."""
        self.config = config
        self.arena = arena
        self.executor = executor
        self.clock = clock
        self.controller = controller
        self.sink = sink if controller is None else BothSinks(sink, controller)
        self._steering = Steering(self)
        self.tiers = TierSet(config.tiers)
        self.cost = CorrectedCost(cost or FixedCost())
        self.memory = Memory.fresh(config, self.cost)
        self.timeouts = Alarms()
        self.longest_request = max_request_tokens(config, arena)
        self.outbox = Outbox()
        self.sequences: dict[str, Sequence] = {}
        self.committer = Committer(self.outbox, self.sequences)
        self.generation = self._new_generation(config.plans.initial)
        self.generation_number = 1
        self.draining = False
        self.last_step_s = clock.now()
        self.next_turn_s = inf
        """When there is something to do although nothing happens until then: a step is due to be
        sent, or the next portion of a switch."""

    # -- receive --

    def submit(self, request: Request) -> None:
        """Accept a request, or answer it with an error."""
        try:
            check_request(
                request, self.sequences, longest=self.longest_request, draining=self.draining
            )
        except ApiError as error:
            self._emit_arrived(request)
            self._refuse(request, error)
            return
        sequence = Sequence(request)
        limit = (len(request.prompt) - 1) // self.arena.block_tokens
        if self.config.prefix_cache:
            extend_hashes(sequence, limit, self.arena.block_tokens)
        self._emit_arrived(request)
        try:
            self.generation.admit(sequence)
        except ApiError as error:
            self._refuse(request, error)
            return
        self._take_in(sequence)

    def _take_in(self, sequence: Sequence) -> None:
        if not self.sequences:
            self.last_step_s = self.clock.now()
        self.sequences[sequence.request_id] = sequence
        self.memory.chains.begin(sequence.request)
        if self.generation.setting.rules.shares:
            tier = self.tiers[sequence.tier]
            self.timeouts.set(sequence, sequence.request.arrival_s + tier.queue_timeout_s)

    def abort(self, request_id: str) -> None:
        """The client does not want the rest: free everything, say nothing more."""
        if (sequence := self.sequences.get(request_id)) is not None:
            self.timeouts.cancel(sequence)
            self.committer.finish(self.generation, sequence, "abort")

    def switch(self, op_id: str, plan: str, reason: str = "asked for") -> None:
        """Go to a plan, unless this was done before; `turn` tells how it went when it has ended."""
        if self.outbox.repeat(op_id):
            return
        switcher = self.generation.switcher
        try:
            report = switcher.start(op_id, self.config.plans[plan], reason)
        except (SwitchRefused, ConfigError) as error:
            report = SwitchReport(op_id, switcher.plan.name, plan, ok=False, message=str(error))
        if report is not None:
            self.outbox.report(report)

    def drain(self) -> None:
        """Accept no more; finish what is here."""
        self.draining = True

    def status(self, op_id: str) -> Status:
        idle = not self.sequences
        return status_of(
            op_id,
            self.generation,
            self.config.plans,
            number=self.generation_number,
            seconds_since_step=0.0 if idle else self.clock.now() - self.last_step_s,
            draining=self.draining,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.sequences) or self.generation.is_moving

    # -- the loop --

    def turn(self) -> list[FromEngine]:
        """One turn; never waits. Returns what clients should hear."""
        start_s = self.clock.now()
        try:
            self._collect(self.executor.poll(0.0))
            if self.controller is not None:
                self.controller.tick(self._steering)
            self._expire()
            is_landing, was_moving = self.generation.landing.is_aiming, self.generation.is_moving
            if not is_landing:  # else the cut over comes before a next step
                self._dispatch()
            self._switch()
            if is_landing or was_moving or self.generation.is_moving:
                self._dispatch()
        except WorkerDied as death:
            self._restart(death)
        self._set_alarm()
        self.generation.switcher.note_turn(self.clock.now() - start_s)
        if self.config.check_accounting:
            check(self.generation.kv)
        return self.outbox.take()

    def _collect(self, replies: list[FromWorker]) -> None:
        for reply in replies:
            if isinstance(reply, StepDone):
                self._end_step(reply)
            elif isinstance(reply, MoveDone):
                self.generation.acknowledge(reply.move_id, reply.bytes)
            elif isinstance(reply, StepsTimed):
                self.sink.emit(RankTimed(at_s=self.clock.now(), rank=reply.rank, steps=reply.steps))

    def _end_step(self, done: StepDone) -> None:
        step = self.generation.in_flight.pop(done.step_id)
        step.loop.num_in_flight -= 1
        self.last_step_s = self.clock.now()
        self.generation.rank_load.ended(step, self.last_step_s)
        if done.seconds > 0.0:
            self.cost.observe(step.loop.lane, step.shape, done.seconds)
        self.committer.commit(self.generation, step, done)

    def _expire(self) -> None:
        """End what waited too long for its first step, and forget idle chains."""
        now = self.clock.now()
        self.memory.chains.expire(now)
        while (sequence := self.timeouts.due(now)) is not None:
            self.timeouts.cancel(sequence)
            if not sequence.is_finished:
                self._give_up_on(sequence)

    def _give_up_on(self, sequence: Sequence) -> None:
        self.committer.withdraw(self.generation, sequence)
        self._refuse(sequence.request, queue_timeout(self.tiers[sequence.tier]), sequence.tier)

    def _switch(self) -> None:
        """A portion of the plan change under way, and of hand-overs."""
        for report in self.generation.advance_moves():
            self.outbox.report(report)

    def _dispatch(self) -> None:
        """Fill every rank's FIFO as far ahead as it may be."""
        load = self.generation.rank_load
        load.send_ahead(self.generation.send_ahead_s)
        while load.is_due(self.clock.now()) and self._dispatch_round():
            pass

    def _set_alarm(self) -> None:
        generation, now = self.generation, self.clock.now()
        self.next_turn_s = generation.rank_load.next_send_s(now)
        if generation.switcher.has_portions:
            self.next_turn_s = min(self.next_turn_s, now + PORTION_S)

    def _dispatch_round(self) -> bool:
        """One step for every lane that can take one; False when there was none.

        Of lanes that share ranks, the one whose next step is most urgent goes first, and one that
        has been passed over for long goes before it.
        """
        generation, load, now = self.generation, self.generation.rank_load, self.clock.now()
        loops = load.due(generation.loops.values(), now)
        if len(loops) > 1:
            loops.sort(key=generation.turn_order())
        load.held.clear()
        num_sent, landing = 0, generation.landing
        for loop in loops:
            if not loop.scheduler.has_work or not load.free_for(loop):
                continue
            if landing.lets_send(loop, now) and self._step(loop):
                landing.note_sent(loop)
                num_sent += 1
        return num_sent > 0

    def _step(self, loop: LaneLoop) -> bool:
        """Compose and send the lane's next step; False if it has none."""
        generation, now = self.generation, self.clock.now()
        start_s = generation.rank_load.start_s(loop, now)
        part = generation.switcher.step_part(now)
        composed = loop.scheduler.compose(generation.dispatcher.num_free_slots, now, start_s, part)
        for resumption in composed.resumed:
            if resumption.rejoins:
                generation.free_slot_of(resumption.sequence)
        step_id = next(generation.step_ids)
        note_changes(self.sink, composed, step_id)
        if composed.chunks:
            self._send(loop, composed, step_id)
        for preemption in composed.preempted:
            generation.preempt(preemption)
        for sequence in composed.put_back:
            generation.put_back(sequence)
        generation.note_evictions()
        return bool(composed.chunks)

    def _send(self, loop: LaneLoop, composed: Composed, step_id: int) -> None:
        generation, chunks = self.generation, tuple(composed.chunks)
        generation.dispatcher.send_step(loop.lane, step_id, generation.switcher.epoch, chunks)
        step = StepInFlight(
            loop, step_id, chunks, set(), composed.now, composed.shape, composed.predicted_s
        )
        generation.in_flight[step_id] = step
        generation.rank_load.sent(step)
        loop.num_in_flight += 1
        loop.last_sent = generation.last_sent = step_id
        emit_sent(self.sink, step)
        prompts: list[Sequence] = []
        for sequence, start, num_tokens, samples in chunks:
            sequence.num_dispatched += num_tokens
            sequence.num_sampling += samples
            if num_tokens > 1 or start < sequence.num_prompt:
                self._begin(sequence, loop, step_id)
                if samples:
                    prompts.append(sequence)
        for sequence in prompts:
            generation.prompt_sent(sequence)

    def _begin(self, sequence: Sequence, loop: LaneLoop, step_id: int) -> None:
        """A chunk of a prompt was sent, maybe its first."""
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = self.clock.now()
            self.timeouts.cancel(sequence)
            self.sink.emit(
                Started(
                    at_s=self.clock.now(),
                    request_id=sequence.request_id,
                    group=loop.group,
                    step_id=step_id,
                    num_cached=sequence.num_cached,
                )
            )

    # -- failures --

    def _restart(self, death: WorkerDied) -> None:
        """A worker is gone: start all of them anew, replay every request from what is known."""
        started_s = self.clock.now()
        old = self.generation
        for report in old.switcher.abandon(f"{death} The workers start anew in this plan."):
            self.outbox.report(report)
        self._start_workers()
        collect_unless_python_does()
        self.generation = self._new_generation(old.switcher.plan.name)
        self.generation_number += 1
        for sequence in self.sequences.values():
            if sequence.state is SeqState.RUNNING:
                sequence.wait_from_s = self.clock.now()
            sequence.forget_kv()
            sequence.num_sampling = 0
            self.generation.route(sequence)
        self.committer.early.clear()
        self.last_step_s = self.clock.now()
        self.sink.emit(
            GenerationStarted(
                at_s=self.last_step_s,
                generation=self.generation_number,
                num_replayed=len(self.sequences),
                restart_s=self.last_step_s - started_s,
            )
        )

    def _start_workers(self) -> None:
        """Raises `WorkerDied` when they cannot be started again."""
        for _ in range(START_ATTEMPTS - 1):
            self.executor.close()
            with suppress(WorkerDied):
                self.executor.start()
                return
        self.executor.start()

    def _new_generation(self, plan: str) -> Generation:
        return Generation(
            self.config,
            self.arena,
            self.executor,
            self.clock,
            self.sink,
            self.tiers,
            self.config.plans[plan],
            self.memory,
        )

    # -- events --

    def _refuse(self, request: Request, error: ApiError, tier: str | None = None) -> None:
        """Say no, in the tier it would have been served as."""
        code, tier = error.code or "invalid_request", tier or request.tier
        self.sink.emit(
            Refused(at_s=self.clock.now(), request_id=request.request_id, tier=tier, code=code)
        )
        self.outbox.put(error_output(request, error, tier))

    def _emit_arrived(self, request: Request) -> None:
        deadline_s = self.memory.chains.deadline_s(request)
        emit_arrived(self.sink, request, self.tiers[request.tier], self.clock.now(), deadline_s)
