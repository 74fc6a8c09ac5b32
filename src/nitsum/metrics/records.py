"""Events folded into one record per request, step and switch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from nitsum.events import (
    AnyEvent,
    Arrived,
    Displaced,
    Downgraded,
    Evicted,
    Finished,
    GenerationStarted,
    HandedOver,
    PlanDecided,
    PlanJudged,
    Preempted,
    Promoted,
    RankTimed,
    Refused,
    Resumed,
    Routed,
    Started,
    StepEnded,
    StepSent,
    SwitchEnded,
    SwitchStarted,
    WaveCommitted,
    WaveProposed,
    WaveRolledBack,
)
from nitsum.plan import Group
from nitsum.step import BatchShape, RankTime

Pause = tuple[float, float | None]
Outcome = Literal["unfinished", "refused", "stop", "length", "abort", "error"]


@dataclass(slots=True)
class RequestRecord:
    """One request's life. Times are on the engine's clock, durations count from `arrival_s`."""

    request_id: str
    tenant: str
    tier_asked: str
    tier_served: str
    arrival_s: float
    num_prompt: int = 0
    max_tokens: int = 0
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    deadline_s: float | None = None
    chain_id: str | None = None
    chain_deadline_s: float | None = None
    outcome: Outcome = "unfinished"
    refused_code: str | None = None
    downgrade_reason: str | None = None
    promised: bool = True
    late: bool = False
    """Kept its tier without a promise."""
    started_s: float | None = None
    finished_s: float | None = None
    num_cached: int = 0
    num_displaced: int = 0
    num_promoted: int = 0
    paused: list[Pause] = field(default_factory=list[Pause])
    """When it was displaced, and when it went on (None: not yet)."""
    token_times: array[float] = field(default_factory=lambda: array("d"))
    """When each answer token became known."""

    @property
    def num_output(self) -> int:
        return len(self.token_times)

    @property
    def is_answered(self) -> bool:
        return self.outcome in ("stop", "length")

    @property
    def queue_s(self) -> float | None:
        """Until the first step that contains it was sent."""
        return None if self.started_s is None else self.started_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_times[0] - self.arrival_s if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        num_gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / num_gaps if num_gaps > 0 else None

    @property
    def longest_gap_s(self) -> float | None:
        return max((b - a for a, b in pairwise(self.token_times)), default=None)

    @property
    def e2e_s(self) -> float | None:
        """Until its end; None while it runs and when it was refused."""
        if self.outcome == "refused" or self.finished_s is None:
            return None
        return self.finished_s - self.arrival_s


@dataclass(slots=True)
class StepRecord:
    """One step, once its result arrived."""

    step_id: int
    group: Group
    ended_s: float
    seconds: float
    sent_s: float | None = None
    num_decode: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    decode_context_tokens: int = 0
    """The part of it that belongs to decodes."""
    predicted_s: float | None = None
    num_tokens_out: int = 0
    waited_s: float = 0.0
    """What the lane's leader knows to have waited for its peers."""
    others: dict[int, RankTime] | None = None
    """By rank, what it took those that do not lead; None before any has said so."""

    def busy_s(self, rank: int) -> float:
        """Without what `rank` waited for its peers: as it says itself, and at least what the step
        took it longer than the quickest, since all end together. One that has said nothing was as
        busy as the leader."""
        times = {} if self.others is None else self.others
        seconds, waited_s = self.seconds, self.waited_s
        if (told := times.get(rank)) is not None:
            _, seconds, waited_s = told
        quickest_s = min([self.seconds, *(time.seconds for time in times.values())])
        return max(0.0, min(seconds - waited_s, quickest_s))

    @property
    def shape(self) -> BatchShape:
        """As the cost model sees it, the numbers of draws aside, which events do not tell.

        Where a prompt is computed again after its room was taken, its answer's last token counts
        as a decode: rare, and small.
        """
        context = min(self.decode_context_tokens, self.context_tokens)
        if not self.num_decode:
            context = 0
        elif not self.prefill_tokens:
            context = self.context_tokens
        return BatchShape(
            self.num_decode,
            context,
            self.prefill_tokens,
            self.context_tokens - context,
            self.num_decode + (self.prefill_tokens > 0),
        )


@dataclass(slots=True)
class WaveRecord:
    wave: int
    proposed_s: float
    proposed_ids: tuple[str, ...]
    committed_s: float | None = None
    """None: rolled back or still under way."""
    moved_ids: tuple[str, ...] = ()
    bytes_moved: int = 0
    rollback_reason: str | None = None


@dataclass(slots=True)
class SwitchRecord:
    op_id: str
    from_plan: str
    to_plan: str
    reason: str
    started_s: float
    waves: list[WaveRecord] = field(default_factory=list[WaveRecord])
    ended_s: float | None = None
    ok: bool = False
    message: str = ""
    bytes_moved: int = 0
    num_left_behind: int = 0

    @property
    def duration_s(self) -> float | None:
        return None if self.ended_s is None else self.ended_s - self.started_s


class Recorder:
    """Folds events, in the order in which they happened; also an `EventSink`."""

    def __init__(self, events: Iterable[AnyEvent] = ()) -> None:
        self.requests: dict[str, RequestRecord] = {}
        self.steps: list[StepRecord] = []
        self.switches: list[SwitchRecord] = []
        self.num_evicted_blocks = 0
        self.restarts: list[GenerationStarted] = []
        self.decisions: list[PlanDecided | PlanJudged] = []
        self.last_s = 0.0
        self._sent: dict[int, StepSent] = {}
        self._partly_told: dict[int, StepRecord] = {}
        """By id, steps of several ranks of which not all have said what it took them."""
        self._told_early: dict[int, dict[int, RankTime]] = {}
        """By step and rank, of steps that have not ended yet."""
        for event in events:
            self.emit(event)

    def emit(self, event: AnyEvent) -> None:
        self.last_s = event.at_s
        match event:
            case StepSent():
                self._step_sent(event)
            case StepEnded():
                self._step_ended(event)
            case Arrived():
                self._arrived(event)
            case Refused():
                self._refused(event)
            case RankTimed():
                self._rank_timed(event)
            case GenerationStarted():
                self.restarts.append(event)
            case PlanDecided() | PlanJudged():
                self.decisions.append(event)
            case Evicted():
                self.num_evicted_blocks += event.num_blocks
            case SwitchStarted() | WaveProposed() | WaveCommitted() | WaveRolledBack():
                self._switch_goes_on(event)
            case SwitchEnded():
                self._switch_ended(event)
            case HandedOver():
                pass
            case _:
                self._request_goes_on(event)

    # -- requests --

    def _arrived(self, event: Arrived) -> None:
        self.requests[event.request_id] = RequestRecord(
            request_id=event.request_id,
            tenant=event.tenant,
            tier_asked=event.tier_asked,
            tier_served=event.tier,
            arrival_s=event.arrival_s,
            num_prompt=event.num_prompt,
            max_tokens=event.max_tokens,
            ttft_target_s=event.ttft_target_s,
            tpot_target_s=event.tpot_target_s,
            deadline_s=event.deadline_s,
            chain_id=event.chain_id,
            chain_deadline_s=event.chain_deadline_s,
        )

    def _refused(self, event: Refused) -> None:
        """A request may be refused before it counts as arrived."""
        record = self.requests.setdefault(
            event.request_id,
            RequestRecord(event.request_id, "", event.tier, event.tier, event.at_s),
        )
        record.outcome, record.refused_code = "refused", event.code
        record.finished_s = event.at_s

    def _request_goes_on(
        self,
        event: Routed
        | Started
        | Downgraded
        | Displaced
        | Preempted
        | Resumed
        | Promoted
        | Finished,
    ) -> None:
        record = self.requests.get(event.request_id)
        if record is None:
            return
        match event:
            case Routed():
                record.promised, record.late = event.promised, event.late
            case Started():
                record.started_s = event.at_s
                record.num_cached = event.num_cached
            case Downgraded():
                record.tier_served = event.to_tier
                record.downgrade_reason = event.reason
            case Displaced():
                record.num_displaced += 1
                _begin_pause(record, event.at_s)
            case Preempted():
                _begin_pause(record, event.at_s)
            case Resumed():
                _end_pause(record, event.at_s)
            case Promoted():
                record.num_promoted += 1
            case Finished():
                record.outcome = event.reason
                record.tier_served = event.tier
                record.finished_s = event.at_s
                _end_pause(record, event.at_s)

    # -- steps --

    def _step_sent(self, event: StepSent) -> None:
        """Ranks tell of a step once it was sent: what is here of another with its number is of
        workers, or a server, that are gone. Each counts from one."""
        self._sent[event.step_id] = event
        self._partly_told.pop(event.step_id, None)
        self._told_early.pop(event.step_id, None)

    def _step_ended(self, event: StepEnded) -> None:
        """Tokens count even for a request that finished with this very step."""
        sent = self._sent.pop(event.step_id, None)
        step = StepRecord(event.step_id, event.group, event.at_s, event.seconds)
        step.waited_s = event.waited_s
        step.others = self._told_early.pop(event.step_id, None)
        if len(step.others or ()) < event.group.degree - 1:
            self._partly_told[event.step_id] = step
        if sent is not None:
            step.sent_s, step.predicted_s = sent.at_s, sent.predicted_s
            step.num_decode, step.prefill_tokens = sent.num_decode, sent.prefill_tokens
            step.context_tokens = sent.context_tokens
        requests, at_s = self.requests, event.at_s
        for request_id, num_tokens in event.tokens:
            record = requests.get(request_id)
            if record is not None:
                if record.token_times:
                    step.decode_context_tokens += record.num_prompt + len(record.token_times)
                if num_tokens == 1:
                    record.token_times.append(at_s)
                else:
                    record.token_times.extend([at_s] * num_tokens)
            step.num_tokens_out += num_tokens
        self.steps.append(step)

    def _rank_timed(self, event: RankTimed) -> None:
        for time in event.steps:
            step = self._partly_told.get(time.step_id)
            if step is None:
                self._told_early.setdefault(time.step_id, {})[event.rank] = time
                continue
            step.others = {**(step.others or {}), event.rank: time}
            if len(step.others) == step.group.degree - 1:
                del self._partly_told[time.step_id]

    # -- switches --

    def _switch_goes_on(
        self, event: SwitchStarted | WaveProposed | WaveCommitted | WaveRolledBack
    ) -> None:
        if isinstance(event, SwitchStarted):
            switch = SwitchRecord(
                event.op_id, event.from_plan, event.to_plan, event.reason, event.at_s
            )
            self.switches.append(switch)
        elif self.switches:
            _wave_goes_on(self.switches[-1], event)

    def _switch_ended(self, event: SwitchEnded) -> None:
        if not self.switches:
            return
        switch = self.switches[-1]
        switch.op_id = event.op_id
        switch.ended_s, switch.ok, switch.message = event.at_s, event.ok, event.message
        switch.bytes_moved, switch.num_left_behind = event.bytes_moved, event.num_left_behind


def _begin_pause(record: RequestRecord, at_s: float) -> None:
    """It may be displaced first and lose its room later: that is one pause."""
    if not record.paused or record.paused[-1][1] is not None:
        record.paused.append((at_s, None))


def _end_pause(record: RequestRecord, at_s: float) -> None:
    if record.paused and record.paused[-1][1] is None:
        record.paused[-1] = (record.paused[-1][0], at_s)


def _wave_goes_on(
    switch: SwitchRecord, event: WaveProposed | WaveCommitted | WaveRolledBack
) -> None:
    if isinstance(event, WaveProposed):
        switch.waves.append(WaveRecord(event.wave, event.at_s, tuple(event.request_ids)))
        return
    wave = next((w for w in switch.waves if w.wave == event.wave), None)
    if wave is None:
        return
    if isinstance(event, WaveCommitted):
        wave.committed_s = event.at_s
        wave.moved_ids = tuple(event.request_ids)
        wave.bytes_moved = event.bytes_moved
    else:
        wave.rollback_reason = event.reason
