"""Everything that lives and dies with one generation of workers: KV, slots, lanes, a switch.

When a worker dies, its generation's memory is gone, and this object with it; requests outlive it.
It is also what a switch sees of the engine (`LaneTable`).
"""

from __future__ import annotations

from itertools import count

from nitsum.clock import Clock
from nitsum.config import EngineConfig
from nitsum.control.switching import Switcher
from nitsum.engine.dispatch import Dispatcher
from nitsum.engine.executor import Executor
from nitsum.engine.lanes import LaneLoop, RankLoad, StepInFlight
from nitsum.events import AnyEvent, EventSink, Routed
from nitsum.kv.cache import ArenaShape, KvCache
from nitsum.messages import Pull, RowPull
from nitsum.plan import Group, Lane, Plan
from nitsum.request import Sequence
from nitsum.sched.lane import LaneScheduler
from nitsum.sched.limits import LaneLimits
from nitsum.sched.router import Router
from nitsum.tier import TierSet


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
    ) -> None:
        self.config = config
        self.clock = clock
        self.sink = sink
        self.tiers = tiers
        self.kv = KvCache(arena, prefix_caching=config.prefix_cache)
        self.dispatcher = Dispatcher(executor, self.kv, config.max_slots)
        self.loops: dict[Group, LaneLoop] = {}
        self.in_flight: dict[int, StepInFlight] = {}
        self.rank_load = RankLoad([0] * arena.num_ranks)
        self.router = Router(self.kv, self.load)
        self.num_departures = 0
        self.step_ids = count(1)
        self.switcher = Switcher(self, plan, units_per_message=config.precopy_units)
        for lane in plan.lanes:
            self.open_lane(lane)

    # -- requests --

    def route(self, sequence: Sequence) -> None:
        """Queue a sequence without KV in the lane that suits it best."""
        lane = self.router.choose(sequence, self.switcher.plan)
        self.loops[lane.group].scheduler.add(sequence)
        self.emit(
            Routed(
                at_s=self.now(),
                request_id=sequence.request_id,
                group=lane.group,
                promised=False,
            )
        )

    def release(self, sequence: Sequence) -> None:
        """The sequence ended: nothing of it stays but cached prefixes."""
        self.switcher.forget(sequence)
        if sequence.group is not None:
            self.loops[sequence.group].scheduler.leave(sequence)
        if sequence.request_id in self.kv.tables:
            self.kv.close(sequence.request_id)
        self._free_slot_of(sequence)
        self.num_departures += 1

    def requeue(self, sequence: Sequence) -> None:
        """The sequence gave up its KV for lack of room; it will compute it again."""
        self.switcher.forget(sequence)
        self._free_slot_of(sequence)
        sequence.forget_kv()
        self.num_departures += 1
        self.route(sequence)

    def _free_slot_of(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.dispatcher.free_slot(sequence.slot)
            sequence.slot = None

    # -- what waves and switches need --

    def now(self) -> float:
        return self.clock.now()

    def emit(self, event: AnyEvent) -> None:
        self.sink.emit(event)

    def send_move(
        self,
        rank: int,
        pulls: list[Pull],
        rows: list[RowPull],
        after: list[tuple[int, int]],
    ) -> int:
        return self.dispatcher.send_move(rank, pulls, rows, after)

    def num_sent(self, rank: int) -> int:
        return self.dispatcher.num_sent(rank)

    def num_settled(self, rank: int) -> int:
        return self.dispatcher.num_settled(rank)

    def take_slot(self) -> int | None:
        return self.dispatcher.take_slot()

    def free_slot(self, slot: int) -> None:
        self.dispatcher.free_slot(slot)

    def leave_lane(self, sequence: Sequence) -> None:
        assert sequence.group is not None
        self.loops[sequence.group].scheduler.leave(sequence)

    def enter_lane(self, sequence: Sequence, group: Group) -> None:
        if sequence.slot is not None:
            self.dispatcher.expect_join(sequence.slot)
        self.loops[group].scheduler.enter(sequence)

    def open_lane(self, lane: Lane) -> None:
        loop = self.loops.get(lane.group)
        if loop is None:
            limits = LaneLimits(self.config.max_num_seqs, self.config.max_batch_tokens)
            scheduler = LaneScheduler(lane, limits, self.kv, self.tiers)
            self.loops[lane.group] = LaneLoop(lane, scheduler)
        else:
            loop.lane = loop.scheduler.lane = lane
            loop.draining = False

    def drain_lane(self, group: Group) -> None:
        loop = self.loops[group]
        loop.draining = True
        for sequence in loop.scheduler.take_waiting():
            self.route(sequence)

    def close_lane(self, group: Group) -> bool:
        loop = self.loops.get(group)
        if loop is None:
            return True
        if loop.num_in_flight or loop.scheduler.has_work:
            return False
        del self.loops[group]
        return True

    def sequences_on(self, group: Group) -> list[Sequence]:
        loop = self.loops.get(group)
        return [] if loop is None else loop.scheduler.with_kv()

    def load(self, group: Group) -> int:
        scheduler = self.loops[group].scheduler
        queues = (scheduler.running, scheduler.paused, scheduler.waiting)
        return sum(sequence.num_total for queue in queues for sequence in queue)

    def level(self, sequence: Sequence) -> int:
        return self.tiers[sequence.tier].level
