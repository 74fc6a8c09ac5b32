"""Everything that lives and dies with one generation of workers: KV, slots, lanes, a switch.

When a worker dies, its generation's memory is gone, and this object with it; requests outlive it.
It is also what a switch sees of the engine (`LaneTable`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from math import inf

from nitsum.clock import Clock
from nitsum.config import EngineConfig
from nitsum.control.handover import HandOvers
from nitsum.control.switching import Switcher
from nitsum.cost.protocol import CostModel
from nitsum.engine.dispatch import Dispatcher
from nitsum.engine.executor import Executor
from nitsum.engine.landing import Landing
from nitsum.engine.lanes import (
    SEND_AHEAD_S,
    LaneLoop,
    RankLoad,
    StepInFlight,
    TurnOrder,
    turn_order,
)
from nitsum.events import AnyEvent, Downgraded, EventSink, Evicted, Routed
from nitsum.kv.cache import ArenaShape, KvCache
from nitsum.messages import SwitchReport
from nitsum.plan import Group, Lane, Plan
from nitsum.sched.admission import OVER_CAPACITY, Admission, Route, Weighed, check_queue
from nitsum.sched.chains import ChainBook
from nitsum.sched.composed import Preemption
from nitsum.sched.estimate import Estimator
from nitsum.sched.fairness import Accounts
from nitsum.sched.lane import LaneScheduler
from nitsum.sched.limits import LaneLimits
from nitsum.sched.rules import RULES
from nitsum.sched.setting import Setting
from nitsum.sched.targets import set_targets
from nitsum.sequence import Sequence
from nitsum.tier import Tier, TierSet

SOON_S = 1.0
"""A lane whose next step may start later than this has no claim over one that has no targets."""


@dataclass(frozen=True)
class Memory:
    """What deciding has learned; it outlives generations."""

    cost: CostModel
    estimator: Estimator
    chains: ChainBook
    accounts: dict[str, Accounts] = field(default_factory=dict[str, Accounts])

    @classmethod
    def fresh(cls, config: EngineConfig, cost: CostModel) -> Memory:
        limits = LaneLimits(config.max_num_seqs, config.max_batch_tokens, config.mixed_tokens)
        return cls(cost, Estimator(cost, limits), ChainBook(config.chain_idle_s))


class Generation:
    """Lanes over one set of workers."""

    def __init__(
        self,
        config: EngineConfig,
        arena: ArenaShape,
        executor: Executor,
        clock: Clock,
        sink: EventSink,
        tiers: TierSet,
        plan: Plan,
        memory: Memory,
    ) -> None:
        self.config = config
        self.memory = memory
        self.clock = clock
        self.sink = sink
        self.tiers = tiers
        self.kv = KvCache(arena, prefix_caching=config.prefix_cache)
        self.dispatcher = Dispatcher(executor, self.kv, config.max_slots)
        self.loops: dict[Group, LaneLoop] = {}
        self.in_flight: dict[int, StepInFlight] = {}
        self.rank_load = RankLoad([0] * arena.num_ranks)
        self.landing = Landing(self.loops, self.rank_load)
        self.setting = Setting(
            clock,
            self.kv,
            tiers,
            memory.estimator.limits,
            memory.cost,
            memory.estimator,
            RULES[config.policy],
            memory.accounts,
        )
        self.admission = Admission(self.setting, arena.num_ranks)
        memory.chains.use(self.kv.prefixes)
        self._has_prefill_lanes = False
        self.num_departures = 0
        self.step_ids = count(1)
        self.last_sent = 0
        """The newest step's number."""
        self.switcher = Switcher(self, plan, units_under_way=config.units_under_way)
        self.hand_overs = HandOvers(self, config.units_under_way)
        for lane in plan.lanes:
            self.open_lane(lane)

    # -- requests --

    def admit(self, sequence: Sequence) -> None:
        """Take a new request in, in its tier or, over capacity, as that tier says.

        Raises the `ApiError` the client should see if it cannot come in.
        """
        tier = self.tiers[sequence.tier]
        waiting = self.setting.accounts_of(self.setting.level(sequence))
        check_queue(tier, waiting, len(sequence.tokens))
        weighed = self.admission.weigh(sequence, self.switcher.plan)
        route = self.admission.best(weighed)
        if not route.promised and self.setting.rules.admits and tier.over_capacity != "queue":
            route = self._over_capacity(sequence, tier, weighed, route)
        self._enqueue(sequence, route)

    def _over_capacity(
        self, sequence: Sequence, tier: Tier, weighed: Weighed, route: Route
    ) -> Route:
        """No lane can promise it. A lane that could not if it were idle is no reason: then the
        machine is too slow for the tier's targets, and order is all the tier still means."""
        admission = self.admission
        if not admission.is_overloaded(weighed):
            return route
        if tier.over_capacity == "refuse":
            raise admission.refusal(weighed)
        lower = self.tiers.below(tier)
        if lower is None:
            return route
        if (late := admission.best_late(weighed)) is not None:
            return late
        sequence.tier, sequence.tier_reason = lower.name, OVER_CAPACITY
        self.emit(
            Downgraded(
                at_s=self.now(),
                request_id=sequence.request_id,
                from_tier=tier.name,
                to_tier=lower.name,
                reason=OVER_CAPACITY,
            )
        )
        return admission.route(sequence, self.switcher.plan)

    def route(self, sequence: Sequence) -> None:
        """Queue a sequence that is in already, but without KV on the device."""
        self.admission.remove(sequence)
        self._enqueue(sequence, self.admission.route(sequence, self.switcher.plan))

    def _enqueue(self, sequence: Sequence, route: Route) -> None:
        sequence.promised, sequence.late = route.promised, route.late
        if self.setting.rules.slack:
            deadline_s = self.memory.chains.deadline_s(sequence.request)
            set_targets(sequence, self.tiers[sequence.tier], route.work, deadline_s)
        self.admission.add(sequence, route)
        self.loops[route.lane.group].scheduler.add(sequence)
        self.emit(
            Routed(
                at_s=self.now(),
                request_id=sequence.request_id,
                group=route.lane.group,
                promised=route.promised,
                late=route.late,
            )
        )

    def release(self, sequence: Sequence) -> None:
        """The sequence ended: nothing of it stays but cached prefixes."""
        self._stop_moving(sequence)
        self.admission.remove(sequence)
        self.memory.chains.end(sequence, self.now())
        if sequence.finish_reason in ("stop", "length"):
            self.memory.estimator.note_answer(sequence.tier, sequence.num_output)
        if sequence.group is not None:
            self.loops[sequence.group].scheduler.leave(sequence)
        if sequence.request_id in self.kv.tables:
            self.kv.close(sequence.request_id)
        if sequence.request_id in self.kv.parked:
            self.kv.discard(sequence.request_id)
        self.free_slot_of(sequence)
        self.num_departures += 1

    def preempt(self, preemption: Preemption) -> None:
        """The sequence lost its room: it comes back from host memory, or is computed again."""
        sequence = preemption.sequence
        if preemption.kept:
            self.put_back(sequence)
        else:
            self._lose_kv(sequence)
            self.free_slot_of(sequence)
            self.admission.remove(sequence)
            sequence.forget_kv()
            for step in self.in_flight.values():
                step.lost.add(sequence)
            self.route(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """The sequence has no room on the device any more, and waits in its lane for some."""
        self._lose_kv(sequence)
        if sequence.group is not None and self.loops[sequence.group].draining:
            self.loops[sequence.group].scheduler.leave(sequence)
            self.route(sequence)

    def _stop_moving(self, sequence: Sequence) -> None:
        self.switcher.forget(sequence)
        self.hand_overs.forget(sequence)

    def _lose_kv(self, sequence: Sequence) -> None:
        self._stop_moving(sequence)
        if self.switcher.current is not None:
            self.switcher.current.stuck.discard(sequence.request_id)  # its lane can close
        self.num_departures += 1

    def free_slot_of(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.dispatcher.free_slot(sequence.slot)
            sequence.slot = None

    # -- what moves --

    def advance_moves(self) -> list[SwitchReport]:
        """One turn of the switch under way and of hand-overs; reports of switches that ended."""
        reports = self.switcher.advance()
        if self._has_prefill_lanes or not self.hand_overs.is_idle:
            self.hand_overs.advance(may_propose=self.switcher.is_waiting)
        return reports

    def acknowledge(self, move_id: int, num_bytes: int) -> None:
        """A rank has carried a move out."""
        self.dispatcher.acknowledge(move_id)
        self.switcher.acknowledge(move_id, num_bytes)
        self.hand_overs.acknowledge(move_id, num_bytes)

    @property
    def is_moving(self) -> bool:
        return self.switcher.current is not None or not self.hand_overs.is_idle

    def prompt_sent(self, sequence: Sequence) -> None:
        """The last chunk of its prompt was sent."""
        self.admission.prefilled(sequence)
        if self.switcher.is_waiting and self._hands_over(sequence.group):
            self.hand_overs.prompt_sent(sequence)

    def _hands_over(self, group: Group | None) -> bool:
        loop = None if group is None else self.loops.get(group)
        return loop is not None and loop.lane.role == "prefill" and not loop.draining

    # -- what hand-overs need --

    def handing_over(self) -> list[Sequence]:
        """Those that run in prefill lanes: first those that have nothing left to do there."""
        found = [
            sequence
            for group, loop in self.loops.items()
            if self._hands_over(group)
            for level in loop.scheduler.running
            for sequence in level
        ]
        found.sort(key=lambda s: (s.num_remaining > 1, self.level(s), s.request.arrival_s))
        return found

    def next_groups(self, sequence: Sequence) -> list[Group]:
        """Lanes with a free place in which its answer may go on, the best first."""
        lanes = [lane for lane in self.switcher.plan.followers if self._has_place(lane.group)]

        def preference(lane: Lane) -> tuple[bool, float]:
            return (not lane.serves(sequence.tier), self.load(lane.group) / lane.degree)

        return [lane.group for lane in sorted(lanes, key=preference)]

    def _has_place(self, group: Group) -> bool:
        num_there = self.loops[group].scheduler.num_running
        return num_there + self.hand_overs.on_way_to(group) < self.config.max_num_seqs

    def hold(self, sequence: Sequence) -> None:
        assert sequence.group is not None
        self.loops[sequence.group].scheduler.hold(sequence)

    def let_go(self, sequence: Sequence) -> None:
        assert sequence.group is not None
        self.loops[sequence.group].scheduler.let_go(sequence)

    def cancel_hand_overs(self) -> None:
        self.hand_overs.cancel()

    @property
    def has_hand_overs(self) -> bool:
        return not self.hand_overs.is_idle

    # -- what waves and switches need --

    @property
    def is_idle(self) -> bool:
        return not self.in_flight and not any(o.scheduler.has_work for o in self.loops.values())

    def now(self) -> float:
        return self.clock.now()

    def emit(self, event: AnyEvent) -> None:
        self.sink.emit(event)

    def has_ended(self, step_id: int) -> bool:
        return all(number > step_id for number in self.in_flight)

    def leave_lane(self, sequence: Sequence) -> None:
        assert sequence.group is not None
        self.loops[sequence.group].scheduler.leave(sequence)
        self.admission.remove(sequence)

    def enter_lane(self, sequence: Sequence, group: Group) -> None:
        if sequence.slot is not None:
            self.dispatcher.expect_join(sequence.slot)
        loop = self.loops[group]
        loop.scheduler.enter(sequence)
        route = self.admission.route_on(sequence, loop.lane, self.switcher.plan)
        self.admission.add(sequence, route)

    def open_lane(self, lane: Lane) -> None:
        self.admission.open_lane(lane)
        loop = self.loops.get(lane.group)
        if loop is None:
            loop = self.loops[lane.group] = LaneLoop(lane, LaneScheduler(lane, self.setting))
            loop.scheduler.is_new = True
        else:
            loop.lane = loop.scheduler.lane = lane
            loop.scheduler.drains = False
        self._meet_neighbours()

    def _meet_neighbours(self) -> None:
        """Lanes that share ranks watch each other's slack."""
        loops = self.loops.values()
        self._has_prefill_lanes = any(loop.lane.role == "prefill" for loop in loops)
        for loop in loops:
            others = [o for o in loops if o is not loop and o.group.overlaps(loop.group)]
            loop.scheduler.neighbours = [other.scheduler for other in others]
        self.rank_load.share(loops)

    def drain_lane(self, group: Group) -> None:
        loop = self.loops[group]
        loop.scheduler.drains = True
        self.route_waiting(group)

    def route_waiting(self, group: Group) -> None:
        for sequence in self.loops[group].scheduler.take_waiting():
            self.route(sequence)

    def begin_settling(self, draining: list[Group]) -> None:
        for group, loop in self.loops.items():
            loop.scheduler.is_settling = any(group.overlaps(other) for other in draining)

    def end_settling(self) -> None:
        for loop in self.loops.values():
            loop.scheduler.is_settling = False

    def close_lane(self, group: Group) -> bool:
        loop = self.loops.get(group)
        if loop is None:
            return True
        if loop.num_in_flight or loop.scheduler.has_work:
            return False
        del self.loops[group]
        self.admission.close_lane(group)
        self._meet_neighbours()
        return True

    def sequences_on(self, group: Group) -> list[Sequence]:
        loop = self.loops.get(group)
        return [] if loop is None else loop.scheduler.with_kv()

    def load(self, group: Group) -> int:
        return self.admission.book.num_tokens(group)

    @property
    def send_ahead_s(self) -> float:
        """How early a rank gets its next step: at once while turns do a switch's work, too."""
        is_filling = not self.switcher.is_waiting and not self.landing.is_aiming
        return inf if is_filling else SEND_AHEAD_S

    def turn_order(self) -> TurnOrder:
        """Which of the lanes that share ranks goes first."""
        soon_s = self.now() + SOON_S if self.setting.rules.slack else -inf
        return turn_order(len(self.loops), self.last_sent, soon_s)

    def note_evictions(self) -> None:
        """Say which cached blocks made room since the last call."""
        for group, num_blocks in self.kv.take_evictions().items():
            self.emit(Evicted(at_s=self.now(), group=group, num_blocks=num_blocks))

    def level(self, sequence: Sequence) -> int:
        return self.tiers[sequence.tier].level
