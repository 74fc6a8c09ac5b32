"""What a plan switch costs the streams that run across it.

Added pause of a stream: its longest gap between two tokens from propose to commit + 100 ms, less
the larger of its median gaps in the old and the new layout. A stream that moved is judged over its
own wave, the others over all waves of the switch. A negative difference is no pause: 0.

Gaps differ without a switch, too, so the same is taken of as long a time that ended when the switch
was proposed: what of a pause is the load's, and not the switch's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from nitsum.metrics.percentiles import Summary, median, summarise
from nitsum.metrics.records import RequestRecord, StepRecord, SwitchRecord

SETTLE_S = 0.1
"""A gap that starts this soon after the commit still counts as the switch's."""
MIN_GAPS = 3
"""Gaps a stream needs on either side for its medians."""
_BASELINE_S = 5.0
ALIKE = 0.1
"""Part of their tokens by which steps may differ to be compared."""


class StreamPause(NamedTuple):
    op_id: str
    request_id: str
    moved: bool
    longest_gap_s: float
    median_gap_s: float
    """The larger of the two layouts'."""
    longest_before_s: float | None
    """The longest gap in as long a time right before; None if the stream or the layout was younger
    than that."""

    @property
    def added_s(self) -> float:
        return max(0.0, self.longest_gap_s - self.median_gap_s)

    @property
    def before_s(self) -> float | None:
        """What would have been the added pause if nothing had been switched."""
        if self.longest_before_s is None:
            return None
        return max(0.0, self.longest_before_s - self.median_gap_s)


class SwitchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """All completed switches of one direction."""

    from_plan: str
    to_plan: str
    num_switches: int
    num_failed: int
    added_pause_s: Summary
    """Of all streams across, moved or not."""
    moved_added_pause_s: Summary
    num_unjudged: int
    """Streams across with too few tokens on one side for a median."""
    duration_s: Summary
    bytes_moved: Summary
    num_left_behind: int
    precopy_slowdown: Summary
    """Median decode step from propose to commit over that of the 5 s before, per switch."""


class _Span(NamedTuple):
    """The part of a stream's life that a switch touches, and what bounds its two layouts."""

    old_s: float
    proposed_s: float
    settled_s: float
    new_s: float


def pauses(
    switches: Sequence[SwitchRecord], records: Iterable[RequestRecord]
) -> tuple[list[StreamPause], dict[str, int]]:
    """Pauses of all streams over all committed switches, and the unjudged streams by op id."""
    streams = [record for record in records if record.num_output >= 2]
    found: list[StreamPause] = []
    unjudged: dict[str, int] = defaultdict(int)
    for switch, old_s, new_s in _with_neighbours(switches):
        for record in streams:
            span, moved = _span(switch, record.request_id, old_s, new_s)
            if not _runs_across(record, span):
                continue
            pause = _pause(switch.op_id, record, span, moved)
            if pause is None:
                unjudged[switch.op_id] += 1
            else:
                found.append(pause)
    return found, dict(unjudged)


def _with_neighbours(
    switches: Sequence[SwitchRecord],
) -> Iterator[tuple[SwitchRecord, float, float]]:
    """Switches with a committed wave, the end of the one before and the start of the one after."""
    committed = [s for s in switches if any(w.committed_s is not None for w in s.waves)]
    for i, switch in enumerate(committed):
        before = committed[i - 1].ended_s if i else None
        after = committed[i + 1].started_s if i + 1 < len(committed) else float("inf")
        old_s = before + SETTLE_S if before is not None else float("-inf")
        yield switch, old_s, after


def _span(switch: SwitchRecord, request_id: str, old_s: float, new_s: float) -> tuple[_Span, bool]:
    waves = [wave for wave in switch.waves if wave.committed_s is not None]
    own = [wave for wave in waves if request_id in wave.moved_ids]
    used = own or waves
    commit_s = max(wave.committed_s or 0.0 for wave in used)
    proposed_s = min(wave.proposed_s for wave in used)
    return _Span(old_s, proposed_s, commit_s + SETTLE_S, new_s), bool(own)


def _runs_across(record: RequestRecord, span: _Span) -> bool:
    return record.token_times[0] < span.proposed_s and record.token_times[-1] > span.settled_s


def _pause(op_id: str, record: RequestRecord, span: _Span, moved: bool) -> StreamPause | None:
    before: list[float] = []
    during: list[float] = []
    after: list[float] = []
    for a, b in _gaps(record):
        if b > span.proposed_s and a < span.settled_s:
            during.append(b - a)
        elif span.old_s <= a and b <= span.proposed_s:
            before.append(b - a)
        elif span.settled_s <= a and b <= span.new_s:
            after.append(b - a)
    if min(len(before), len(after)) < MIN_GAPS:
        return None
    typical_s = max(median(before), median(after))
    longest_s = max(during, default=0.0)
    return StreamPause(
        op_id, record.request_id, moved, longest_s, typical_s, _longest_before(record, span)
    )


def _longest_before(record: RequestRecord, span: _Span) -> float | None:
    start_s = 2 * span.proposed_s - span.settled_s
    if start_s < max(span.old_s, record.token_times[0]):
        return None
    gaps = (b - a for a, b in _gaps(record) if start_s < b <= span.proposed_s)
    return max(gaps, default=0.0)


def _gaps(record: RequestRecord) -> Iterator[tuple[float, float]]:
    """Neighbouring token times; tokens that came together are one."""
    return ((a, b) for a, b in pairwise(record.token_times) if b > a)


def precopy_slowdown(switch: SwitchRecord, steps: Iterable[StepRecord]) -> float | None:
    """How much longer decode-only steps took while KV was copied; None without such steps, or if
    they took no time."""
    copying = _copy_times([switch])
    during: list[float] = []
    before: list[float] = []
    for step in steps:
        if step.prefill_tokens or not step.num_decode:
            continue
        if _is_within(step, copying):
            during.append(step.seconds)
        elif switch.started_s - _BASELINE_S <= step.ended_s < switch.started_s:
            before.append(step.seconds)
    usual_s = median(before) if before else 0.0
    return median(during) / usual_s if during and usual_s else None


def copy_slowdown_s(
    switch: SwitchRecord, switches: Iterable[SwitchRecord], steps: Sequence[StepRecord]
) -> float | None:
    """How much longer steps took from propose to commit than steps of about as many tokens outside
    of all switches' copies: medians, seconds; None without such steps.

    Steps are shorter during a switch, so that those right before it are no measure.
    """
    own, others = _copy_times([switch]), _copy_times(switches)
    during = [step for step in steps if _is_within(step, own)]
    if not during:
        return None
    size = median(step.num_decode + step.prefill_tokens for step in during)
    alike = [
        step.seconds
        for step in steps
        if abs(step.num_decode + step.prefill_tokens - size) <= ALIKE * size
        and not _is_within(step, others)
    ]
    return median(step.seconds for step in during) - median(alike) if alike else None


def _copy_times(switches: Iterable[SwitchRecord]) -> list[tuple[float, float]]:
    waves = (wave for switch in switches for wave in switch.waves)
    return [(w.proposed_s, w.committed_s) for w in waves if w.committed_s is not None]


def _is_within(step: StepRecord, times: Iterable[tuple[float, float]]) -> bool:
    return any(start_s <= step.ended_s <= end_s for start_s, end_s in times)


def summarise_switches(
    switches: Sequence[SwitchRecord],
    records: Iterable[RequestRecord],
    steps: Sequence[StepRecord],
    *,
    small_samples: bool = False,
) -> list[SwitchSummary]:
    """One summary per direction, in the order of their first switch."""
    found, unjudged = pauses(switches, records)
    directions: dict[tuple[str, str], list[SwitchRecord]] = defaultdict(list)
    for switch in switches:
        if switch.ended_s is not None:
            directions[(switch.from_plan, switch.to_plan)].append(switch)
    return [
        _summary(direction, found, unjudged, steps, small_samples)
        for direction in directions.values()
    ]


def _summary(
    switches: list[SwitchRecord],
    found: list[StreamPause],
    unjudged: dict[str, int],
    steps: Sequence[StepRecord],
    small_samples: bool,
) -> SwitchSummary:
    ids = {switch.op_id for switch in switches}
    of_these = [pause for pause in found if pause.op_id in ids]
    done = [switch for switch in switches if switch.ok]

    def summary(values: Iterable[float | None]) -> Summary:
        return summarise(values, small_samples=small_samples)

    return SwitchSummary(
        from_plan=switches[0].from_plan,
        to_plan=switches[0].to_plan,
        num_switches=len(done),
        num_failed=len(switches) - len(done),
        added_pause_s=summary(pause.added_s for pause in of_these),
        moved_added_pause_s=summary(pause.added_s for pause in of_these if pause.moved),
        num_unjudged=sum(unjudged.get(op_id, 0) for op_id in ids),
        duration_s=summary(switch.duration_s for switch in done),
        bytes_moved=summary(float(switch.bytes_moved) for switch in done),
        num_left_behind=sum(switch.num_left_behind for switch in done),
        precopy_slowdown=summary(precopy_slowdown(switch, steps) for switch in done),
    )
