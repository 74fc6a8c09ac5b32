"""A switch under way, how far it is, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from nitsum.control.filling import Filling
from nitsum.control.following import Following
from nitsum.control.migration import Wave
from nitsum.events import SwitchEnded, WaveCommitted, WaveProposed
from nitsum.messages import SwitchReport, WaveReport
from nitsum.plan import Group, Plan


@dataclass
class Switch:
    """A switch under way."""

    op_id: str
    """The operation that started it; its events carry this id."""
    src: Plan
    dst: Plan
    started_s: float
    last_sent: int
    """The last step sent before it: what came up to this one is of full length."""
    waves: list[WaveReport] = field(default_factory=list[WaveReport])
    stuck: set[str] = field(default_factory=set[str])
    """Requests that could not be moved when it was tried last."""
    also_asked: list[str] = field(default_factory=list[str])
    """Operations that asked for the same plan meanwhile; each gets the report too."""
    is_open: bool = False
    """New lanes take new work, old ones drain."""
    filling: Filling | None = None
    wave: Wave | None = None
    """Cut over, and not acknowledged by all."""
    following: Following | None = None
    """Cached prefixes on their way; stays when it is over."""
    failed_at: int = -1
    """`num_departures` when nothing could be proposed; no new try before it grows."""
    longest_turn_s: float = 0.0

    @property
    def draining(self) -> list[Group]:
        """Groups that it empties: those that only the old plan has."""
        kept = set(self.dst.groups)
        return [group for group in self.src.groups if group not in kept]

    def record(self, wave: Wave) -> None:
        """The wave is finished."""
        times, totals = wave.times, wave.totals
        filled_s = times.filled_s or times.cut_over_s  # cut short for lack of room
        self.waves.append(
            WaveReport(
                num_requests=len(totals.moved),
                num_cached_blocks=0,
                bytes_moved=totals.bytes_moved,
                units_in_place=totals.units_in_place,
                propose_s=filled_s - times.proposed_s,
                precopy_s=times.cut_over_s - filled_s,
                cutover_s=times.done_s - times.cut_over_s,
            )
        )

    def report(self, now: float, *, ok: bool, message: str) -> SwitchReport:
        return SwitchReport(
            op_id=self.op_id,
            from_plan=self.src.name,
            to_plan=self.dst.name,
            ok=ok,
            message=message,
            duration_s=now - self.started_s,
            waves=self.waves,
            num_left_behind=len(self.stuck),
            longest_turn_s=self.longest_turn_s,
        )


def proposed(
    switch: Switch, wave: int, request_ids: list[str], num_units: int, at_s: float
) -> WaveProposed:
    return WaveProposed(
        at_s=at_s, op_id=switch.op_id, wave=wave, request_ids=request_ids, num_units=num_units
    )


def committed(
    switch: Switch, wave: int, request_ids: list[str], bytes_moved: int, at_s: float
) -> WaveCommitted:
    return WaveCommitted(
        at_s=at_s, op_id=switch.op_id, wave=wave, request_ids=request_ids, bytes_moved=bytes_moved
    )


def ended(report: SwitchReport, at_s: float) -> SwitchEnded:
    """The event that tells what the report does."""
    return SwitchEnded(
        at_s=at_s,
        op_id=report.op_id,
        from_plan=report.from_plan,
        to_plan=report.to_plan,
        ok=report.ok,
        message=report.message,
        duration_s=report.duration_s,
        bytes_moved=sum(wave.bytes_moved for wave in report.waves),
        num_left_behind=report.num_left_behind,
        longest_turn_s=report.longest_turn_s,
    )
