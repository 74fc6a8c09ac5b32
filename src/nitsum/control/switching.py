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

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import structs

from nitsum.control.courier import Courier
from nitsum.control.migration import Lanes, SequenceMove, Wave
from nitsum.errors import SwitchRefused
from nitsum.events import (
    AnyEvent,
    SwitchEnded,
    SwitchStarted,
    WaveCommitted,
    WaveProposed,
    WaveRolledBack,
)
from nitsum.kv.transfer import Transfer, free_copies, stays_home
from nitsum.messages import SwitchReport, WaveReport
from nitsum.plan import Group, Lane, Plan
from nitsum.request import Sequence


class LaneTable(Lanes, Protocol):
    """What a switch needs of the engine beyond what a wave needs."""

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

    def close_lane(self, group: Group) -> bool:
        """Remove a drained lane; False while a step of it is in flight."""
        ...

    def sequences_on(self, group: Group) -> list[Sequence]:
        """Those that hold KV in the group's layout, most urgent first."""
        ...

    def load(self, group: Group) -> int:
        """Positions that the lane's sequences hold or wait to compute."""
        ...

    def level(self, sequence: Sequence) -> int: ...

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


FILL_BLOCKS = 96
"""Blocks reserved and sent a turn: about 0.3 ms of Python."""
RELEASE_BLOCKS = 192
"""Sources let go, or cached blocks dropped, a turn: about as long."""
IDLE_FACTOR = 32
"""How many times more a turn may do while there is nothing to step."""
PATIENCE_TURNS = 32
"""Turns that a filled wave waits, at most, for prompts under way to become part of it cheaply."""
REQUESTS_PER_SPARE_BLOCK = 4
"""A fill ends early when less than a block for so many requests is free for them to go on."""
HOME_REQUESTS = 2
"""Requests like it by which a lane may be ahead of the idlest and be chosen all the same, because
the request's pages can grow in place there."""
TAIL_BLOCKS = 2
"""Blocks a request may have left to copy at the cut-over: one being written, one just full."""


@dataclass
class _Filling:
    """A wave being put together."""

    wave: Wave
    number: int
    waiting: deque[Sequence]
    """Requests not looked at yet."""
    num_tried: dict[Sequence, int] = field(default_factory=dict[Sequence, int])
    """Destinations that had no room for a request after all."""
    refused: set[Sequence] = field(default_factory=set[Sequence])
    """Those that fit nowhere in this wave."""
    num_turns_full: int = 0
    """Turns since everything was reserved for the first time."""
    is_closing: bool = False
    """Nothing more is pre-copied: cut over when all that is under way has arrived."""


@dataclass
class _Following:
    """Cached prefixes that come after the requests."""

    number: int
    """It counts as a wave."""
    started_s: float
    bytes_before: int
    num_blocks: int = 0
    units_in_place: int = 0
    is_over: bool = False


@dataclass
class Switch:
    """A switch under way."""

    op_id: str
    """The operation that started it; its events carry this id."""
    src: Plan
    dst: Plan
    started_s: float
    waves: list[WaveReport] = field(default_factory=list[WaveReport])
    stuck: set[str] = field(default_factory=set[str])
    """Requests that could not be moved when it was tried last."""
    also_asked: list[str] = field(default_factory=list[str])
    """Operations that asked for the same plan meanwhile; each gets the report too."""
    is_open: bool = False
    """New lanes take new work, old ones drain."""
    filling: _Filling | None = None
    wave: Wave | None = None
    """Cut over, and not acknowledged by all."""
    following: _Following | None = None
    """Cached prefixes on their way; stays when it is over."""
    failed_at: int = -1
    """`num_departures` when nothing could be proposed; no new try before it grows."""
    longest_turn_s: float = 0.0


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
        self.fill_blocks = fill_blocks
        self.courier = Courier(lanes, units_under_way)
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
        self.current = Switch(op_id, self.plan, target, now)
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
        if switch.filling is not None:
            self._fill(switch, switch.filling)
        elif self.lanes.has_hand_overs:
            return []  # nothing is proposed before what they bring is there
        elif switch.wave is None and self._is_over(switch):
            return self._end(switch, ok=True, message="")
        return []

    def _is_over(self, switch: Switch) -> bool:
        """Begin the next wave when the last one's sources are gone; True if nothing is left."""
        if not self.courier.is_leaving and self._propose(switch):
            return False
        return not self._follow(switch) and self._close_drained(switch)

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
        return [] if switch is None else _only_in(switch.src, switch.dst)

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
        switch.filling = _Filling(wave, self._wave_id, deque(waiting))
        kv = self.lanes.kv
        num_blocks = sum(len(kv.tables[s.request_id].blocks) for s in waiting)
        ids = [sequence.request_id for sequence in waiting]
        self._emit_proposed(switch, ids, num_blocks * kv.arena.units_per_block)
        self._fill(switch, switch.filling)
        return True

    def _fill(self, switch: Switch, filling: _Filling) -> None:
        """One portion of reserving and pre-copying; cut over when it is time."""
        wave = filling.wave
        if not filling.is_closing:
            is_full = self._fill_portion(switch, filling)
            wave.flush()
            if self._is_short_of_room(filling):
                self._stop_filling(filling)
            elif is_full:
                filling.num_turns_full += 1
                wave.times.filled_s = wave.times.filled_s or self.lanes.now()
                filling.is_closing = self._is_worth_closing(filling)
        if filling.is_closing and self.courier.is_quiet:
            self._cut_over(switch, filling)

    def _fill_portion(self, switch: Switch, filling: _Filling) -> bool:
        """True when all that fits is reserved, and on its way as far as it is final."""
        wave, left = filling.wave, self._portion(self.fill_blocks)
        for move in list(wave.moves.values()):
            left -= self._reserve(switch, filling, move, left)
        most = len(switch.dst.lanes)  # destinations can take copies side by side
        while left > 0 and sum(not wave.is_filled(m) for m in wave.moves.values()) < most:
            move = self._add_next(switch, filling)
            if move is None:
                break
            left -= self._reserve(switch, filling, move, left)
        return not filling.waiting and all(map(wave.is_filled, wave.moves.values()))

    def _reserve(
        self, switch: Switch, filling: _Filling, move: SequenceMove, num_blocks: int
    ) -> int:
        count = filling.wave.fill(move, num_blocks)
        if count is not None:
            return count
        sequence = move.sequence
        filling.wave.drop(sequence)
        filling.num_tried[sequence] = filling.num_tried.get(sequence, 0) + 1
        filling.waiting.appendleft(sequence)
        return 1  # so that a turn ends

    def _add_next(self, switch: Switch, filling: _Filling) -> SequenceMove | None:
        """The next request that is likely to fit becomes part of the wave."""
        wave, waiting = filling.wave, filling.waiting
        if not waiting:
            waiting.extend(
                sequence
                for sequence in self._sequences()
                if sequence.request_id not in wave.moves and sequence not in filling.refused
            )
        while waiting:
            sequence = waiting.popleft()
            if sequence.request_id not in self.lanes.kv.tables or sequence.is_finished:
                continue  # it ended, or gave up its KV, meanwhile
            first = filling.num_tried.get(sequence, 0)
            for dst in self._destinations(switch.dst, sequence, wave)[first:]:
                if not wave.fits(sequence, dst, len(waiting)):
                    continue
                if (move := wave.add(sequence, dst)) is not None:
                    switch.stuck.discard(sequence.request_id)
                    return move
            filling.refused.add(sequence)
            switch.stuck.add(sequence.request_id)
        return None

    def _destinations(self, plan: Plan, sequence: Sequence, wave: Wave) -> list[Group]:
        """Lanes of the new plan by preference: made for what it needs next, serving its tier, idle,
        near. Lanes about as idle as the idlest are equal if its KV can stay where it is."""
        src = sequence.group
        assert src is not None
        unfit = "decode" if sequence.num_remaining > 1 else "prefill"
        load = {lane.group: self.lanes.load(lane.group) for lane in plan.lanes}
        for move in wave.moves.values():
            load[move.dst] += move.sequence.num_total

        kv = self.lanes.kv
        blocks = kv.tables[sequence.request_id].blocks
        least = min(load[lane.group] / lane.degree for lane in plan.lanes)
        most = least + HOME_REQUESTS * sequence.num_total

        def preference(lane: Lane) -> tuple[bool, bool, float, bool]:
            load_of = load[lane.group] / lane.degree
            is_home = load_of <= most and stays_home(kv, blocks, lane.group)
            return (
                lane.role == unfit,
                not lane.serves(sequence.tier),
                least if is_home else load_of,
                not (is_home or lane.group.overlaps(src)),
            )

        return [lane.group for lane in sorted(plan.lanes, key=preference)]

    def _is_short_of_room(self, filling: _Filling) -> bool:
        """Whether those that go on in the old lanes may soon lack a block."""
        num_requests = len(filling.wave.moves) + len(filling.waiting) + len(filling.refused)
        count = max(1, num_requests // REQUESTS_PER_SPARE_BLOCK)
        kv = self.lanes.kv
        is_short = any(kv.free_blocks(group) < count for group in self.draining)
        return is_short and bool(filling.wave.moves)

    def _stop_filling(self, filling: _Filling) -> None:
        """Cut over what is complete, which gives room back. A request alone goes on until it is."""
        wave = filling.wave
        incomplete = [move for move in wave.moves.values() if wave.num_lacking(move)]
        if len(incomplete) == 1 == len(wave.moves):
            return
        for move in incomplete:
            wave.drop(move.sequence)
        filling.is_closing = True

    def _is_worth_closing(self, filling: _Filling) -> bool:
        """Whether what would be left to copy is small, or has not become so for long."""
        wave = filling.wave
        num_left = sum(map(wave.num_left, wave.moves.values()))
        return (
            num_left <= TAIL_BLOCKS * (len(wave.moves) + 1)
            or filling.num_turns_full >= PATIENCE_TURNS
        )

    def _cut_over(self, switch: Switch, filling: _Filling) -> None:
        wave, switch.filling = filling.wave, None
        self._add_late(switch, filling)
        self._open(switch)
        wave.cut_over()
        switch.wave = wave
        if not wave.totals.moved:
            switch.failed_at = self.lanes.num_departures

    def _add_late(self, switch: Switch, filling: _Filling) -> None:
        """Take along who came since: left behind, a request would keep its old lane going."""
        wave, left = filling.wave, self.fill_blocks
        while left > 0 and (move := self._add_next(switch, filling)) is not None:
            left -= wave.num_lacking(move)
            if left < 0:
                wave.drop(move.sequence)

    # -- cached prefixes --

    def _follow(self, switch: Switch) -> bool:
        """Cached prefixes follow, the most valuable first, as far as free units allow; False when
        that is over. Each turn sends a portion."""
        if self._sequences():
            return False
        if switch.following is None:
            switch.following = self._begin_following(switch)
        following = switch.following
        if following.is_over:
            return False
        sent = [self._follow_from(switch, following, src) for src in self.draining]
        if any(sent) or not self.courier.is_quiet or self.courier.is_leaving:
            return True
        following.is_over = True
        self._end_following(switch, following)
        return False

    def _begin_following(self, switch: Switch) -> _Following:
        self._wave_id += 1
        self._emit_proposed(switch, [], 0)
        return _Following(self._wave_id, self.lanes.now(), self.courier.bytes_moved)

    def _follow_from(self, switch: Switch, following: _Following, src: Group) -> bool:
        kv = self.lanes.kv
        dst = next(lane.group for lane in switch.dst.lanes if lane.group.overlaps(src))
        room = self.courier.room(dst, kv.arena.page_units(dst))
        count = min(room, self._portion(self.fill_blocks), free_copies(kv, src, dst))
        known = kv.prefixes.in_layout(dst)
        blocks = kv.prefixes.newest(src, count)
        for block in blocks:
            if block.hash in known:
                kv.evict(block)
        fresh = [block for block in blocks if block.hash is not None]
        if fresh:
            transfer = Transfer(kv, src, dst)
            following.num_blocks += transfer.reserve(fresh)
            self.courier.send_final(transfer.copy(len(transfer.blocks)))
            transfer.settle()
            transfer.share()
            self.courier.leave(transfer, keep=False)
            following.units_in_place += transfer.num_in_place
        return bool(blocks)

    def _end_following(self, switch: Switch, following: _Following) -> None:
        now, num_bytes = self.lanes.now(), self.courier.bytes_moved - following.bytes_before
        switch.waves.append(
            WaveReport(
                num_requests=0,
                num_cached_blocks=following.num_blocks,
                bytes_moved=num_bytes,
                units_in_place=following.units_in_place,
                propose_s=0.0,
                precopy_s=now - following.started_s,
                cutover_s=0.0,
            )
        )
        self._emit_committed(switch, following.number, [], num_bytes)

    # -- reports --

    def _record(self, switch: Switch, wave: Wave) -> None:
        wave.finish()
        times, totals = wave.times, wave.totals
        switch.waves.append(
            WaveReport(
                num_requests=len(totals.moved),
                num_cached_blocks=0,
                bytes_moved=totals.bytes_moved,
                units_in_place=totals.units_in_place,
                propose_s=times.filled_s - times.proposed_s,
                precopy_s=times.cut_over_s - times.filled_s,
                cutover_s=times.done_s - times.cut_over_s,
            )
        )
        self._emit_committed(switch, self._wave_id, totals.moved, totals.bytes_moved)

    def _emit_proposed(self, switch: Switch, request_ids: list[str], num_units: int) -> None:
        self.lanes.emit(
            WaveProposed(
                at_s=self.lanes.now(),
                op_id=switch.op_id,
                wave=self._wave_id,
                request_ids=request_ids,
                num_units=num_units,
            )
        )

    def _emit_committed(
        self, switch: Switch, number: int, request_ids: list[str], bytes_moved: int
    ) -> None:
        self.lanes.emit(
            WaveCommitted(
                at_s=self.lanes.now(),
                op_id=switch.op_id,
                wave=number,
                request_ids=request_ids,
                bytes_moved=bytes_moved,
            )
        )

    def _end(self, switch: Switch, *, ok: bool, message: str) -> list[SwitchReport]:
        now = self.lanes.now()
        self.current = None
        report = SwitchReport(
            op_id=switch.op_id,
            from_plan=switch.src.name,
            to_plan=switch.dst.name,
            ok=ok,
            message=message,
            duration_s=now - switch.started_s,
            waves=switch.waves,
            num_left_behind=len(switch.stuck),
            longest_turn_s=switch.longest_turn_s,
        )
        self.lanes.emit(
            SwitchEnded(
                at_s=now,
                op_id=switch.op_id,
                from_plan=switch.src.name,
                to_plan=switch.dst.name,
                ok=ok,
                message=message,
                duration_s=report.duration_s,
                bytes_moved=sum(wave.bytes_moved for wave in switch.waves),
                num_left_behind=report.num_left_behind,
                longest_turn_s=switch.longest_turn_s,
            )
        )
        others = [structs.replace(report, op_id=op_id) for op_id in switch.also_asked]
        return [report, *others]


def _only_in(plan: Plan, other: Plan) -> list[Group]:
    kept = set(other.groups)
    return [group for group in plan.groups if group not in kept]
