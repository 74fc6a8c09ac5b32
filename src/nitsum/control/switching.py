"""From one plan to another: lanes come and go, requests follow in waves, nobody else notices.

Every turn does a bounded piece of work, counted in blocks, so that steps never wait for it:

    fill      the old lanes go on and take new work, while a wave reserves and pre-copies their KV
    open      all that fits is there: new lanes open, old ones drain, requests cut over together
    release   sources are let go; what did not fit follows in further waves
    follow    cached prefixes come after, as far as free units allow
    close     emptied lanes go, with what is left of their cache

New work stays with the old lanes until the cut-over, although it has to move then: in a new lane it
would take turns with them on the same ranks, and every stream would feel both lanes' steps in each
of its gaps for as long as the fill lasts. Only where nothing fits do new lanes open before it.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

from msgspec import structs

from nitsum.control.courier import Courier
from nitsum.control.filling import Filling, FillingLanes
from nitsum.control.following import Following
from nitsum.control.migration import Wave
from nitsum.control.switch import Switch, committed, ended, proposed
from nitsum.errors import SwitchRefused
from nitsum.events import AnyEvent, SwitchStarted, WaveRolledBack
from nitsum.messages import SwitchReport
from nitsum.plan import Group, Lane, Plan
from nitsum.sequence import Sequence


class Landing(Protocol):
    """Lets lanes that are about to be emptied come to their last steps together."""

    def begin(self, groups: list[Group]) -> None:
        """Nobody new gets KV in these lanes; does nothing if it has begun."""
        ...

    def aim(self, now: float) -> bool:
        """Make their last steps end together; True when they will, and it is time to cut over."""
        ...

    def end(self) -> None:
        """Cut over, or called off."""
        ...


class LaneTable(FillingLanes, Protocol):
    """What a switch needs of the engine beyond what filling a wave needs."""

    def emit(self, event: AnyEvent) -> None: ...

    def open_lane(self, lane: Lane) -> None:
        """Start a lane, or give a running one a new role and tiers."""
        ...

    def drain_lane(self, group: Group) -> None:
        """No new work; what waits without KV is routed anew."""
        ...

    def route_waiting(self, group: Group) -> None:
        """What waits there without KV is routed anew: the lane takes no prompts any more."""
        ...

    def begin_settling(self, draining: list[Group]) -> None:
        """Nobody new gets KV on these ranks that is not free: the sources are about to be."""
        ...

    def end_settling(self) -> None:
        """The sources are gone."""
        ...

    def close_lane(self, group: Group) -> bool:
        """Remove a drained lane; False while a step of it is in flight."""
        ...

    @property
    def landing(self) -> Landing: ...

    def level(self, sequence: Sequence) -> int: ...

    def has_ended(self, step_id: int) -> bool:
        """All steps up to this one have."""
        ...

    def cancel_hand_overs(self) -> None:
        """Undo those that are not cut over."""
        ...

    @property
    def has_hand_overs(self) -> bool:
        """Requests are on their way out of prefill lanes: what they bring is not there yet."""
        ...

    @property
    def is_idle(self) -> bool:
        """No step is under way, or to be sent, that a long turn could delay."""
        ...

    @property
    def num_departures(self) -> int:
        """Grows whenever a request ends or gives up its KV: a failed proposal may work now."""
        ...


STEP_PART = 0.5
"""Of the tokens of a step while a switch is under way, if it has decodes: what a cut over makes
them wait, shorter steps before and after it make up for. Prompts are computed a sixth slower."""
SHORT_S = 0.1
"""How long steps stay short after it."""
FILL_BLOCKS = 96
"""Blocks reserved and sent a turn: 2 to 5 ms of Python where others have to be evicted for them."""
RELEASE_BLOCKS = 192
"""Sources let go, or cached blocks dropped, a turn: about as long."""
IDLE_FACTOR = 32
"""How many times more a turn may do while there is nothing to step."""


class Switcher:
    """Runs at most one switch at a time, one wave at a time."""

    def __init__(
        self,
        lanes: LaneTable,
        initial: Plan,
        *,
        units_under_way: int = 256,
        fill_blocks: int = FILL_BLOCKS,
    ) -> None:
        self.lanes = lanes
        self.plan = initial
        """The plan in force: a switch's new one from the moment its lanes open."""
        self.current: Switch | None = None
        self.epoch = 0
        self.short_until_s = -inf
        self.fill_blocks = fill_blocks
        self.courier = Courier(lanes.dispatcher, units_under_way)
        self._wave_id = 0

    def start(self, op_id: str, target: Plan, reason: str = "asked for") -> SwitchReport | None:
        """Begin; the report at once if the plan is in force already.

        Raises `SwitchRefused` while another switch is under way.
        """
        if self.current is not None:
            if self.current.dst.name == target.name:
                if op_id != self.current.op_id:
                    self.current.also_asked.append(op_id)
                return None
            raise SwitchRefused(
                f"A switch to {self.current.dst.name} is under way. Try again when it has ended."
            )
        if target.name == self.plan.name:
            return SwitchReport(op_id, target.name, target.name, True, "already in force")
        now = self.lanes.now()
        self.lanes.cancel_hand_overs()
        self.current = Switch(op_id, self.plan, target, now, self.lanes.last_sent)
        self.lanes.emit(
            SwitchStarted(
                at_s=now, op_id=op_id, from_plan=self.plan.name, to_plan=target.name, reason=reason
            )
        )
        return None

    def advance(self) -> list[SwitchReport]:
        """One turn of work; when the switch ends with it, a report for everybody who asked."""
        switch = self.current
        if switch is None:
            return []
        self.courier.let_go(self._portion(RELEASE_BLOCKS))
        if switch.wave is not None and switch.wave.is_done:
            self._record(switch, switch.wave)
            switch.wave = None
        if switch.wave is None and not self.courier.is_leaving:
            self.lanes.end_settling()
        if switch.filling is not None:
            self._fill(switch, switch.filling)
        elif self.lanes.has_hand_overs or not self.lanes.has_ended(switch.last_sent):
            return []  # nothing is proposed before what they bring is there, and steps are short
        elif switch.wave is None and self._is_over(switch):
            return self._end(switch, ok=True, message="")
        return []

    def _is_over(self, switch: Switch) -> bool:
        """Begin the next wave when the last one's sources are gone; True if nothing is left."""
        if not self.courier.is_leaving and self._propose(switch):
            return False
        return switch.is_open and not self._follow(switch) and self._close_drained(switch)

    def acknowledge(self, move_id: int, num_bytes: int) -> None:
        self.courier.acknowledge(move_id, num_bytes)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or gave up its KV."""
        if self.current is not None and self.current.filling is not None:
            self.current.filling.wave.drop(sequence)

    def note_turn(self, seconds: float) -> None:
        """How long a turn of the engine took."""
        if self.current is not None:
            self.current.longest_turn_s = max(self.current.longest_turn_s, seconds)

    def cancel_wave(self, reason: str) -> None:
        """Roll the wave under way back, if it is not cut over; the switch will try again."""
        switch = self.current
        if switch is None or switch.filling is None:
            return
        filling, switch.filling = switch.filling, None
        self.lanes.landing.end()
        self.lanes.emit(
            WaveRolledBack(
                at_s=self.lanes.now(),
                op_id=switch.op_id,
                wave=filling.number,
                request_ids=filling.wave.cancel(),
                reason=reason,
            )
        )

    def abandon(self, message: str) -> list[SwitchReport]:
        """The workers are gone, and with them all KV: the new plan is in force at once."""
        if self.current is None:
            return []
        self.plan = self.current.dst
        return self._end(self.current, ok=True, message=message)

    def step_part(self, now: float) -> float:
        """Part of its tokens that a step with decodes may compute."""
        return 1.0 if self.is_waiting and now >= self.short_until_s else STEP_PART

    def plan_of(self, group: Group | None) -> Plan:
        """The plan whose lane it is: during a switch, lanes being emptied are the old plan's."""
        switch = self.current
        if switch is None or group is None or switch.dst.lane_of(group) is not None:
            return self.plan
        return switch.src

    @property
    def draining(self) -> list[Group]:
        """Groups that the switch under way empties."""
        switch = self.current
        return [] if switch is None else switch.draining

    @property
    def has_portions(self) -> bool:
        """There is a bounded piece of work for the next turn, whatever happens until then."""
        switch = self.current
        if switch is None:
            return False
        if switch.filling is not None:
            return not switch.filling.is_closing
        return self.courier.is_leaving or switch.following is not None

    @property
    def is_waiting(self) -> bool:
        """Nothing is on its way by a switch, and nothing could be proposed now."""
        switch = self.current
        if switch is None:
            return True
        is_still = switch.filling is None and switch.wave is None and not self.courier.is_leaving
        return is_still and switch.is_open and switch.failed_at == self.lanes.num_departures

    # -- lanes --

    def _open(self, switch: Switch) -> None:
        if switch.is_open:
            return
        switch.is_open = True
        self.epoch += 1
        self.plan = switch.dst
        for lane in switch.dst.lanes:
            self.lanes.open_lane(lane)
        for lane in switch.dst.lanes:
            if lane.role == "decode":
                self.lanes.route_waiting(lane.group)
        for group in self.draining:
            self.lanes.drain_lane(group)

    def _close_drained(self, switch: Switch) -> bool:
        """Remove emptied lanes; True when none is left."""
        done = [self._close(group) for group in self.draining]
        return all(done) and not self.courier.is_leaving

    def _close(self, group: Group) -> bool:
        if self.lanes.sequences_on(group) or not self.lanes.close_lane(group):
            return False
        return self.lanes.kv.evict_group(group, self._portion(RELEASE_BLOCKS))

    def _sequences(self) -> list[Sequence]:
        """Those that have KV in lanes that are to be emptied."""
        return [s for group in self.draining for s in self.lanes.sequences_on(group)]

    def _portion(self, num_blocks: int) -> int:
        return num_blocks * IDLE_FACTOR if self.lanes.is_idle else num_blocks

    # -- a wave --

    def _propose(self, switch: Switch) -> bool:
        """Begin a wave; False if there is nothing to move, or nothing that could be moved now."""
        waiting = self._sequences()
        if not waiting:
            self._open(switch)
            return False
        if switch.failed_at == self.lanes.num_departures:
            return False
        self._wave_id += 1
        wave = Wave(self.lanes, self.courier, keep_sources=False)
        switch.filling = Filling(
            self.lanes,
            wave,
            number=self._wave_id,
            waiting=waiting,
            sources=self.draining,
            plan=switch.dst,
            stuck=switch.stuck,
        )
        kv = self.lanes.kv
        num_blocks = sum(len(kv.tables[s.request_id].blocks) for s in waiting)
        ids = [sequence.request_id for sequence in waiting]
        num_units = num_blocks * kv.arena.units_per_block
        self.lanes.emit(proposed(switch, self._wave_id, ids, num_units, self.lanes.now()))
        self._fill(switch, switch.filling)
        return True

    def _fill(self, switch: Switch, filling: Filling) -> None:
        """One portion of reserving and pre-copying; cut over when it is time."""
        if not filling.is_closing:
            filling.advance(self._portion(self.fill_blocks))
            if filling.is_closing or filling.full_since is not None:
                self.lanes.landing.begin(self.draining)
        if not filling.is_closing or not self.courier.is_quiet:
            return
        if self.lanes.landing.aim(self.lanes.now()):
            self._cut_over(switch, filling)

    def _cut_over(self, switch: Switch, filling: Filling) -> None:
        wave, switch.filling = filling.wave, None
        self.lanes.landing.end()
        filling.add_late(self.fill_blocks)
        self._open(switch)
        wave.cut_over()
        switch.wave = wave
        self.lanes.begin_settling(self.draining)
        if not wave.totals.moved:
            switch.failed_at = self.lanes.num_departures

    # -- cached prefixes --

    def _follow(self, switch: Switch) -> bool:
        """Cached prefixes follow, the most valuable first, as far as free units allow; False when
        that is over. Each turn sends a portion."""
        if self._sequences():
            return False
        if switch.following is None and self.courier.is_leaving:
            return True  # newcomers wait for the room that the sources leave, not for this
        if switch.following is None:
            switch.following = self._begin_following(switch)
        following = switch.following
        if following.is_over:
            return False
        if following.advance(self._portion(self.fill_blocks)):
            return True
        report = following.report()
        switch.waves.append(report)
        now = self.lanes.now()
        self.lanes.emit(committed(switch, following.number, [], report.bytes_moved, now))
        return False

    def _begin_following(self, switch: Switch) -> Following:
        self._wave_id += 1
        self.lanes.emit(proposed(switch, self._wave_id, [], 0, self.lanes.now()))
        return Following(
            self.lanes,
            self.courier,
            number=self._wave_id,
            sources=self.draining,
            plan=switch.dst,
        )

    # -- reports --

    def _record(self, switch: Switch, wave: Wave) -> None:
        wave.finish()
        switch.record(wave)
        moved, num_bytes = wave.totals.moved, wave.totals.bytes_moved
        self.lanes.emit(committed(switch, self._wave_id, moved, num_bytes, self.lanes.now()))

    def _end(self, switch: Switch, *, ok: bool, message: str) -> list[SwitchReport]:
        now = self.lanes.now()
        self.current = None
        self.short_until_s = now + SHORT_S
        report = switch.report(now, ok=ok, message=message)
        self.lanes.emit(ended(report, now))
        others = [structs.replace(report, op_id=op_id) for op_id in switch.also_asked]
        return [report, *others]
