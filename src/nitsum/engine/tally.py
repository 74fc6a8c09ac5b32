"""Counts what happens, for metrics and dashboards: an event sink in front of another one."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from pathlib import Path
from typing import Literal

from nitsum.config import EngineConfig
from nitsum.engine.launch import worker_specs
from nitsum.events import (
    AnyEvent,
    Displaced,
    EventSink,
    Evicted,
    FileSink,
    Finished,
    GenerationStarted,
    PlanDecided,
    Promoted,
    RankTimed,
    Refused,
    StepEnded,
    SwitchEnded,
    SwitchStarted,
    WaveCommitted,
    WaveProposed,
    WaveRolledBack,
)
from nitsum.messages import Ready
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import comm_layout
from nitsum.snapshot import Buckets, Happening, Restart
from nitsum.snapshot import Tally as TallyReport

WINDOW_S = 10
"""A rank's busy share is that of the last seconds."""
MAX_RECENT = 40
GAP_BOUNDS_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)

Kind = Literal["switch", "decision", "restart", "trouble"]


class Tally:
    """Passes every event on, and keeps counters of them. Costs a few dictionary updates a step."""

    def __init__(self, sink: EventSink, num_ranks: int, plan_memory: dict[str, int]) -> None:
        self._sink = sink
        self._plan_memory = plan_memory
        self._memory: list[dict[str, int]] = []
        self._preemptions: Counter[tuple[str, str]] = Counter()
        self._promotions: Counter[str] = Counter()
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._num_output_tokens = 0
        self._num_evicted_blocks = 0
        self._restarts: list[GenerationStarted] = []
        self._busy = BusyRanks(num_ranks)
        self._gaps = SwitchGaps()
        self._recent: deque[Happening] = deque(maxlen=MAX_RECENT)
        self._going: Happening | None = None
        """About the switch under way."""

    def emit(self, event: AnyEvent) -> None:
        """Count an event and pass it on."""
        self._sink.emit(event)
        match event:
            case StepEnded():
                self._busy.add(event)
                self._gaps.step(event)
                self._num_output_tokens += sum(count for _, count in event.tokens)
            case RankTimed():
                self._busy.timed(event)
            case Finished():
                self._gaps.finished(event.request_id)
            case Displaced():
                self._preemptions[event.tier, event.by_tier] += 1
            case Promoted():
                self._promotions[event.tier] += 1
            case Refused():
                self._refusals[event.tier, event.code] += 1
            case Evicted():
                self._num_evicted_blocks += event.num_blocks
            case _:
                self._emit_rare(event)

    def _emit_rare(self, event: AnyEvent) -> None:
        match event:
            case WaveProposed():
                self._gaps.proposed(event.request_ids)
            case WaveCommitted():
                self._gaps.committed(event.request_ids)
            case WaveRolledBack():
                self._gaps.rolled_back(event.request_ids)
            case GenerationStarted():
                self._restarts.append(event)
                self._gaps = SwitchGaps(self._gaps)
            case _:
                pass
        if isinstance(event, SwitchEnded) and self._going in self._recent:
            self._recent.remove(self._going)  # its end says it all
        told = sentence(event)
        if told is not None:
            self._tell(event.at_s, *told)
        if isinstance(event, SwitchStarted):
            self._going = self._recent[-1]

    def flush(self) -> None:
        """Write out what a file holds back; called when the engine is idle."""
        if isinstance(self._sink, FileSink):
            self._sink.flush()

    def started(self, workers: list[Ready]) -> None:
        """Workers are warm; what their memory goes to."""
        self._memory = [ready.memory_bytes for ready in workers]

    def report(self, now_s: float) -> TallyReport:
        """Everything counted so far."""
        restarts = self._restarts
        return TallyReport(
            preemptions=[(*tiers, count) for tiers, count in sorted(self._preemptions.items())],
            promotions=sorted(self._promotions.items()),
            refusals=[(*what, count) for what, count in sorted(self._refusals.items())],
            num_output_tokens=self._num_output_tokens,
            num_evicted_blocks=self._num_evicted_blocks,
            num_restarts=len(restarts),
            num_replayed=sum(restart.num_replayed for restart in restarts),
            last_restarts=[_restart(event) for event in restarts[-MAX_RECENT:]],
            rank_busy_s=list(self._busy.total_s),
            rank_waiting_s=list(self._busy.waiting_s),
            rank_busy_ratio=self._busy.ratios(now_s),
            switch_gaps=self._gaps.report(),
            plan_memory_bytes=self._plan_memory,
            memory_bytes=self._memory,
            recent=list(self._recent),
        )

    def _tell(self, at_s: float, kind: Kind, text: str) -> None:
        """Remember a sentence; the same one again only raises its count."""
        count = 1
        if self._recent and self._recent[-1].text == text:
            count += self._recent.pop().count
        self._recent.append(Happening(at_s, kind, text, count))


class BusyRanks:
    """Seconds that each rank spent in steps: in all, and by second of the last few."""

    def __init__(self, num_ranks: int) -> None:
        self.total_s = [0.0] * num_ranks
        self.waiting_s = [0.0] * num_ranks
        """Of that, inside collectives, as far as ranks can tell."""
        self._seconds: deque[tuple[int, list[float]]] = deque(maxlen=WINDOW_S + 1)

    def add(self, step: StepEnded) -> None:
        """A lane's ranks were all busy for as long as its step took."""
        second = int(step.at_s)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, [0.0] * len(self.total_s)))
        current = self._seconds[-1][1]
        for rank in step.group.ranks:
            self.total_s[rank] += step.seconds
            current[rank] += step.seconds
        self.waiting_s[step.group.leader] += step.waited_s

    def timed(self, event: RankTimed) -> None:
        """What ranks say that do not lead."""
        self.waiting_s[event.rank] += sum(time.waited_s for time in event.steps)

    def ratios(self, now_s: float) -> list[float]:
        """Share of the last `WINDOW_S` seconds, by rank."""
        recent = [busy for second, busy in self._seconds if second > now_s - WINDOW_S]
        return [
            min(1.0, sum(busy[rank] for busy in recent) / WINDOW_S)
            for rank in range(len(self.total_s))
        ]


class SwitchGaps:
    """How long streams that a switch moves go without a token.

    A stream is watched from the proposal of its wave to its first token after the commit; what
    counts is the longest gap in between.
    """

    def __init__(self, before: SwitchGaps | None = None) -> None:
        """`before` has counts to go on from, of workers that are gone."""
        self._counts = before._counts if before else [0] * (len(GAP_BOUNDS_S) + 1)
        self._sum_s = before._sum_s if before else 0.0
        self._last_s: dict[str, float] = {}
        self._longest_s: dict[str, float] = {}
        self._moved: set[str] = set()

    def step(self, event: StepEnded) -> None:
        for request_id, count in event.tokens:
            if count:
                self._token(request_id, event.at_s)

    def _token(self, request_id: str, at_s: float) -> None:
        if request_id in self._longest_s:
            gap_s = at_s - self._last_s.get(request_id, at_s)
            self._longest_s[request_id] = max(gap_s, self._longest_s[request_id])
            if request_id in self._moved:
                self._observe(self._longest_s.pop(request_id))
                self._moved.discard(request_id)
        self._last_s[request_id] = at_s

    def _observe(self, gap_s: float) -> None:
        self._counts[bisect_left(GAP_BOUNDS_S, gap_s)] += 1
        self._sum_s += gap_s

    def proposed(self, request_ids: list[str]) -> None:
        """Watch streams that have begun; a prompt that moves has no tokens to be late."""
        self._longest_s |= dict.fromkeys(self._last_s.keys() & set(request_ids), 0.0)

    def committed(self, request_ids: list[str]) -> None:
        self._moved |= self._longest_s.keys() & set(request_ids)

    def rolled_back(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._longest_s.pop(request_id, None)

    def finished(self, request_id: str) -> None:
        for known in (self._last_s, self._longest_s):
            known.pop(request_id, None)
        self._moved.discard(request_id)

    def report(self) -> Buckets:
        return Buckets(list(GAP_BOUNDS_S), list(self._counts), self._sum_s)


def sentence(event: AnyEvent) -> tuple[Kind, str] | None:
    """A rare event in words; None for those nobody needs to read."""
    match event:
        case SwitchStarted():
            return "switch", f"Going from {event.from_plan} to {event.to_plan}: {event.reason}."
        case SwitchEnded(ok=False):
            return "trouble", f"Not gone to {event.to_plan}: {event.message}"
        case SwitchEnded():
            return "switch", _switched(event)
        case WaveRolledBack():
            num = len(event.request_ids)
            return "trouble", f"A wave of {num} request(s) was taken back: {event.reason}"
        case GenerationStarted():
            return "restart", _restart(event).words
        case PlanDecided() if event.chosen != event.plan:
            return "decision", f"{event.chosen} instead of {event.plan}: {event.reason}"
        case _:
            return None


def _switched(event: SwitchEnded) -> str:
    mib = event.bytes_moved / (1 << 20)
    moved = f"{mib:.1f} MiB of KV moved" if event.bytes_moved else "no KV had to move"
    left = f"; {event.num_left_behind} finish in the old layout" if event.num_left_behind else ""
    took = f"in {event.duration_s * 1000:.0f} ms"
    return f"From {event.from_plan} to {event.to_plan} {took}; {moved}{left}."


def _restart(event: GenerationStarted) -> Restart:
    return Restart(event.restart_s, event.num_replayed)


def plan_memory_bytes(config: EngineConfig, shape: ModelShape) -> dict[str, int]:
    """Bytes of the buffers through which each plan's lanes communicate.

    Known for CPU ranks, whose groups share one buffer each; empty elsewhere.
    """
    if config.device != "cpu":
        return {}
    spec = worker_specs(config, shape, folder=Path())[0]
    geometry = Geometry(shape, config.max_tp, config.min_tp)
    return {
        plan.name: sum(comm_layout(spec, geometry, lane.group).size_bytes for lane in plan.lanes)
        for plan in config.plans.plans
    }
