"""From one plan to another: lanes come and go, requests follow in waves, nobody else notices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import structs

from nitsum.control.migration import Lanes, Wave
from nitsum.errors import SwitchRefused
from nitsum.events import (
    AnyEvent,
    SwitchEnded,
    SwitchStarted,
    WaveCommitted,
    WaveProposed,
    WaveRolledBack,
)
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

    @property
    def num_departures(self) -> int:
        """Grows whenever a request ends or gives up its KV: a failed proposal may work now."""
        ...


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
    wave: Wave | None = None
    failed_at: int = -1
    """`num_departures` when nothing could be proposed; no new try before it grows."""


class Switcher:
    """Runs at most one switch at a time, one wave at a time."""

    def __init__(
        self,
        lanes: LaneTable,
        initial: Plan,
        *,
        units_per_message: int = 256,
        max_wave_requests: int = 32,
        max_wave_blocks: int = 256,
    ) -> None:
        self.lanes = lanes
        self.plan = initial
        """The plan in force; during a switch already the new one."""
        self.current: Switch | None = None
        self.epoch = 0
        self.units_per_message = units_per_message
        self.max_wave_requests = max_wave_requests
        self.max_wave_blocks = max_wave_blocks
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
        self.current = Switch(op_id, self.plan, target, now)
        self.lanes.emit(
            SwitchStarted(
                at_s=now, op_id=op_id, from_plan=self.plan.name, to_plan=target.name, reason=reason
            )
        )
        self._open(self.current)
        return None

    def advance(self) -> list[SwitchReport]:
        """One turn of work; when the switch ends with it, a report for everybody who asked."""
        switch = self.current
        if switch is None:
            return []
        if switch.wave is not None:
            if not switch.wave.advance():
                return []
            self._record(switch, switch.wave)
            switch.wave = None
        switch.wave = self._propose(switch)
        if switch.wave is not None:
            switch.wave.advance()  # its first messages leave in this turn
            return []
        if not self._close_drained(switch):
            return []
        return self._end(switch, ok=True, message="")

    def acknowledge(self, move_id: int, num_bytes: int) -> None:
        if self.current is not None and self.current.wave is not None:
            self.current.wave.acknowledge(move_id, num_bytes)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended or gave up its KV."""
        if self.current is not None and self.current.wave is not None:
            self.current.wave.drop(sequence)

    def cancel_wave(self, reason: str) -> None:
        """Roll the wave under way back, as far as it is not cut over; the switch will try again."""
        switch = self.current
        if switch is None or switch.wave is None:
            return
        dropped = switch.wave.cancel()
        if dropped:
            self.lanes.emit(
                WaveRolledBack(
                    at_s=self.lanes.now(),
                    op_id=switch.op_id,
                    wave=self._wave_id,
                    request_ids=dropped,
                    reason=reason,
                )
            )

    def abandon(self, message: str) -> list[SwitchReport]:
        """The workers are gone, and with them all KV: the new plan is in force at once."""
        return [] if self.current is None else self._end(self.current, ok=True, message=message)

    @property
    def draining(self) -> list[Group]:
        """Groups that the switch under way empties."""
        switch = self.current
        return [] if switch is None else _only_in(switch.src, switch.dst)

    # -- inside --

    def _open(self, switch: Switch) -> None:
        self.epoch += 1
        self.plan = switch.dst
        for lane in switch.dst.lanes:
            self.lanes.open_lane(lane)
        for group in _only_in(switch.src, switch.dst):
            self.lanes.drain_lane(group)

    def _propose(self, switch: Switch) -> Wave | None:
        started_s = self.lanes.now()
        groups = _only_in(switch.src, switch.dst)
        waiting = [sequence for group in groups for sequence in self.lanes.sequences_on(group)]
        if waiting and switch.failed_at == self.lanes.num_departures:
            return None
        wave = Wave(self.lanes, self.units_per_message)
        if waiting:
            self._add_sequences(switch, wave, waiting)
            if wave.is_empty:
                switch.failed_at = self.lanes.num_departures
                return None
        else:
            self._add_cached(switch, wave, groups)
        if wave.is_empty:
            return None
        self._wave_id += 1
        wave.times.propose_s = self.lanes.now() - started_s
        self._emit_proposed(switch, wave)
        return wave

    def _add_sequences(self, switch: Switch, wave: Wave, waiting: list[Sequence]) -> None:
        load = {lane.group: self.lanes.load(lane.group) for lane in switch.dst.lanes}
        for sequence in waiting:
            if len(wave.moves) == self.max_wave_requests:
                break
            for dst in self._destinations(switch.dst, sequence, load):
                if wave.add_sequence(sequence, dst, self.lanes.level(sequence)):
                    load[dst] += sequence.num_total
                    switch.stuck.discard(sequence.request_id)
                    break
            else:
                switch.stuck.add(sequence.request_id)

    def _destinations(
        self, plan: Plan, sequence: Sequence, load: dict[Group, int]
    ) -> Iterable[Group]:
        """Lanes of the new plan by preference: they serve its tier, are idle, and are near."""
        src = sequence.group
        assert src is not None

        def preference(lane: Lane) -> tuple[bool, bool, float, bool]:
            return (
                lane.role == "prefill" and not sequence.in_prefill,
                not lane.serves(sequence.tier),
                load[lane.group] / lane.degree,
                not lane.group.overlaps(src),
            )

        return [lane.group for lane in sorted(plan.lanes, key=preference)]

    def _add_cached(self, switch: Switch, wave: Wave, groups: list[Group]) -> None:
        """Cached prefixes follow, most recently used first, as far as free units allow."""
        kv = self.lanes.kv
        room = self.max_wave_blocks
        for src in groups:
            dst = next(lane.group for lane in switch.dst.lanes if lane.group.overlaps(src))
            blocks = [
                block
                for block in reversed(kv.prefixes.idle(src))
                if block.hash is not None and kv.prefixes.get(dst, block.hash) is None
            ]
            room -= wave.add_cached(src, dst, blocks[: max(0, room)])

    def _close_drained(self, switch: Switch) -> bool:
        """Remove emptied lanes; True when none is left."""
        done = True
        for group in _only_in(switch.src, switch.dst):
            if self.lanes.sequences_on(group) or not self.lanes.close_lane(group):
                done = False
            else:
                self.lanes.kv.evict_group(group)
        return done

    def _emit_proposed(self, switch: Switch, wave: Wave) -> None:
        transfers = [move.transfer for move in wave.moves.values()] + wave.cached
        self.lanes.emit(
            WaveProposed(
                at_s=self.lanes.now(),
                op_id=switch.op_id,
                wave=self._wave_id,
                request_ids=list(wave.moves),
                num_units=sum(len(transfer.unit_copies()) for transfer in transfers),
            )
        )

    def _record(self, switch: Switch, wave: Wave) -> None:
        times, totals = wave.times, wave.totals
        switch.waves.append(
            WaveReport(
                num_requests=totals.num_requests,
                num_cached_blocks=totals.num_cached_blocks,
                bytes_moved=totals.bytes_moved,
                units_in_place=totals.units_in_place,
                propose_s=times.propose_s,
                precopy_s=times.cut_over_s - times.proposed_s,
                cutover_s=times.done_s - times.cut_over_s,
            )
        )
        self.lanes.emit(
            WaveCommitted(
                at_s=self.lanes.now(),
                op_id=switch.op_id,
                wave=self._wave_id,
                request_ids=totals.moved,
                bytes_moved=totals.bytes_moved,
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
            )
        )
        others = [structs.replace(report, op_id=op_id) for op_id in switch.also_asked]
        return [report, *others]


def _only_in(plan: Plan, other: Plan) -> list[Group]:
    kept = set(other.groups)
    return [group for group in plan.groups if group not in kept]
