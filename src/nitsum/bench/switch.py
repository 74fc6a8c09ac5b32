"""What a switch costs the streams that run across it, in an arena that is full.

    streams      `num_streams` greedy answers, always running, of the highest tier
    background   requests of the lowest tier that keep arriving: so many that they fill whatever
                 room is left, or a few, while cached prefixes fill it
    switch       when the arena is full, a prompt is half computed and every stream has a few gaps

In float32, the text of every stream is then compared with the static layout's.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random

from msgspec import structs

from nitsum.bench.driver import Answer, Driver, Workers
from nitsum.bench.moved import holds_kv
from nitsum.bench.scenario import plan_walk, static_plan
from nitsum.bench.stages import OnStage
from nitsum.bench.steadiness import Steadiness, watched
from nitsum.bench.switch_load import (
    NUM_BACKGROUND,
    Options,
    background,
    engine_config,
    stream_prompts,
)
from nitsum.bench.texts import CLOSE_LOGITS, best_two_gap, first_difference
from nitsum.errors import NitsumError
from nitsum.messages import SwitchReport
from nitsum.metrics.percentiles import Summary, summarise
from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.metrics.switches import (
    SETTLE_S,
    SwitchSummary,
    copy_slowdown_s,
    pauses,
    summarise_switches,
)
from nitsum.plan import PlanSet
from nitsum.request import Request
from nitsum.shape import ModelShape

FULL = 0.95
"""Share of all ranks' units in use from which the arena counts as full: by requests, or by requests
and cached blocks (`Options.fill`)."""
MIN_TOKENS = 8
"""Tokens each stream has had since the switch before: enough gaps for a median."""
PATIENCE_S = 60.0
"""A switch waits so long for a full arena; one that then starts anyway is counted apart."""


@dataclass
class Result:
    reports: list[SwitchReport]
    directions: list[SwitchSummary]
    added_pause_s: Summary
    """Of all streams across all switches."""
    use_at_switch: list[float]
    """Mean use of the ranks' arenas when each switch began."""
    num_in_full_arena: int
    """Switches that began with a full arena and a prefill in flight."""
    num_streams: int
    num_same: int
    """Streams whose text is the static layout's to the last token."""
    num_close: int
    """Streams that left it where the reference's two best logits were too close to call."""
    different: list[str] = field(default_factory=list[str])
    """Streams that left it anywhere else."""
    pause_before_s: Summary = field(default_factory=lambda: summarise(()))
    """The same of as long a time before each switch."""
    slowdown_s: Summary = field(default_factory=lambda: summarise(()))
    """How much longer the old lanes' steps took while KV was copied, per switch."""
    machine: Steadiness = field(default_factory=Steadiness)

    @property
    def counts(self) -> bool:
        """Every text is right, and every switch ended well and began in a full arena."""
        all_ok = all(report.ok for report in self.reports)
        return not self.different and all_ok and self.num_in_full_arena >= len(self.reports)

    def figures(self) -> dict[str, float]:
        waves = [wave for report in self.reports for wave in report.waves]
        count = max(1, len(self.reports))
        pause = self.added_pause_s
        found = {
            "num_switches": len(self.reports),
            "num_switches_in_full_arena": self.num_in_full_arena,
            "lowest_use_at_switch_share": min(self.use_at_switch, default=0.0),
            "num_pauses": pause.num,
            "added_pause_p50_ms": _ms(pause.p50),
            "added_pause_p99_ms": _ms(pause.p99),
            "added_pause_max_ms": _ms(pause.max),
            "pause_without_switch_p50_ms": _ms(self.pause_before_s.p50),
            "pause_without_switch_p99_ms": _ms(self.pause_before_s.p99),
            "pause_without_switch_max_ms": _ms(self.pause_before_s.max),
            "moved_bytes_per_switch": sum(w.bytes_moved for w in waves) / count,
            "units_in_place_per_switch": sum(w.units_in_place for w in waves) / count,
            "longest_turn_ms": 1e3 * max((r.longest_turn_s for r in self.reports), default=0.0),
            "num_waves_per_switch": len(waves) / count,
            "switch_ms": 1e3 * sum(report.duration_s for report in self.reports) / count,
            "propose_ms_per_switch": 1e3 * sum(w.propose_s for w in waves) / count,
            "precopy_ms_per_switch": 1e3 * sum(w.precopy_s for w in waves) / count,
            "cutover_ms_per_switch": 1e3 * sum(w.cutover_s for w in waves) / count,
            "precopy_step_slowdown_ms": _ms(self.slowdown_s.p50),
            "num_left_behind": sum(report.num_left_behind for report in self.reports),
            "num_streams": self.num_streams,
            "num_streams_same_text": self.num_same,
            "num_streams_close_call": self.num_close,
            "num_streams_different": len(self.different),
        }
        known = {name: value for name, value in found.items() if value is not None}
        return {**known, **self.machine.figures()}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def measure(options: Options, on_stage: OnStage, note: Callable[[str], None]) -> Result:
    """Run the streams across all switches, then without any, and compare."""
    with Workers(engine_config(options), on_progress=note) as workers:
        recorder = Recorder()
        run = Run(options, workers.driver(sink=recorder), recorder, workers.shape, on_stage)
        with watched() as machine:
            run.to_the_end()
        result = replace(run.result(), machine=machine)
        if options.dtype != "float32":
            return result
        compare_text(result, run.streams(), _static_streams(workers, options, run, on_stage))
    return result


class Run:
    """Streams under switches, one turn at a time."""

    def __init__(
        self,
        options: Options,
        driver: Driver,
        recorder: Recorder,
        shape: ModelShape,
        on_stage: OnStage,
    ) -> None:
        """`recorder` is the driver's sink."""
        self._options = options
        self._on_stage = on_stage
        self._recorder = recorder
        self.driver = driver
        self._now = driver.clock.now
        self._prompts = stream_prompts(options, shape.vocab_size)
        self._background = background(options, shape.vocab_size)
        walk = plan_walk(options.plans.plans, options.plans.initial, Random(options.seed))
        self._targets = list(islice(walk, options.num_switches))
        self._num_started = 0
        self._over_s: float | None = None
        """When the last switch was over and nothing more was submitted."""
        self._due_s = self._now() + PATIENCE_S
        self._num_in_full_arena = 0
        self._use_at_switch: list[float] = []
        self._lengths: dict[str, int] = {}
        """Tokens each running stream had when the last switch had settled."""
        self._settled_s = 0.0

    def to_the_end(self) -> None:
        while self.goes_on():
            self.refill()
            if self.is_time_to_switch():
                self.switch()
            self.driver.turn()

    def goes_on(self) -> bool:
        return self._wants_more() or bool(self._running())

    def streams(self) -> list[Answer]:
        answers = self.driver.answers
        return [answer for request_id, answer in answers.items() if request_id[0] == "s"]

    def refill(self) -> None:
        """As many streams as there should be, and some of the background always waiting."""
        if not self._wants_more():
            return
        for _ in range(self._options.num_streams - len(self._running())):
            self.driver.submit(next(self._prompts))
        for _ in range(self._num_missing()):
            self.driver.submit(next(self._background))

    def _num_missing(self) -> int:
        """Background requests to submit now."""
        if self._options.fill == "requests":
            return self._options.num_streams - self.driver.core.status("switch").num_waiting
        return NUM_BACKGROUND + self._options.num_streams - self.driver.num_active

    def is_time_to_switch(self) -> bool:
        if not self._wants_switch() or self.driver.is_switching or not self._has_gaps():
            return False
        return self._is_full_and_in_prefill() or self._now() > self._due_s

    def switch(self) -> None:
        target = self._targets[self._num_started]
        self._on_stage(f"Switching to {target}", self._num_started, len(self._targets))
        self._num_in_full_arena += self._is_full_and_in_prefill()
        self._use_at_switch.append(self._use())
        self._num_started += 1
        self._due_s = self._now() + PATIENCE_S
        self._lengths = {}
        self.driver.switch(target)

    def result(self) -> Result:
        records = [
            _until(record, self._over_s)
            for name, record in self._recorder.requests.items()
            if name[0] == "s"
        ]
        switches = self._recorder.switches
        found, _ = pauses(switches, records)
        return Result(
            reports=self.driver.reports,
            directions=summarise_switches(
                switches, records, self._recorder.steps, small_samples=True
            ),
            added_pause_s=summarise((pause.added_s for pause in found), small_samples=True),
            pause_before_s=summarise((p.before_s for p in found), small_samples=True),
            use_at_switch=self._use_at_switch,
            num_in_full_arena=self._num_in_full_arena,
            slowdown_s=summarise(self._slowdowns_s(), small_samples=True),
            num_streams=len(self.streams()),
            num_same=0,
            num_close=0,
        )

    def _slowdowns_s(self) -> Iterator[float]:
        """Of the lanes that each switch empties, while KV is copied."""
        switches, steps = self._recorder.switches, self._recorder.steps
        for switch in switches:
            groups = self._options.plans[switch.from_plan].groups
            old = [step for step in steps if step.group in groups]
            slowdown_s = copy_slowdown_s(switch, switches, old)
            if slowdown_s is not None:
                yield slowdown_s

    def _wants_switch(self) -> bool:
        return self._num_started < len(self._targets)

    def _wants_more(self) -> bool:
        """Until the last switch has ended and every stream has had a few tokens since."""
        if len(self.driver.reports) == len(self._targets) and self._has_gaps():
            self._over_s = self._over_s or self._now()
        return self._over_s is None

    def _running(self) -> list[Answer]:
        """Streams that go on; raises `NitsumError` when one was refused."""
        streams = self.streams()
        for answer in streams:
            if answer.error is not None:
                raise NitsumError(f"A stream ended in an error: {answer.error}")
        return [answer for answer in streams if answer.finish_reason is None]

    def _has_gaps(self) -> bool:
        """Every stream has had enough tokens since the switch before had settled."""
        if self.driver.is_switching:
            self._settled_s = self._now() + SETTLE_S
        running = self._running()
        if self._now() < self._settled_s:
            return False
        for answer in running:
            self._lengths.setdefault(answer.request.request_id, len(answer.tokens))
        counts = [
            len(answer.tokens) - self._lengths[answer.request.request_id] for answer in running
        ]
        return len(counts) == self._options.num_streams and min(counts) >= MIN_TOKENS

    def _use(self) -> float:
        if self._options.fill == "requests":
            kv_used = self.driver.core.status("switch").kv_used
        else:
            pools = self.driver.core.generation.kv.pools
            kv_used = [1.0 - pool.num_free / pool.num_units for pool in pools]
        return sum(kv_used) / len(kv_used)

    def _is_full_and_in_prefill(self) -> bool:
        sequences = self.driver.core.sequences.values()
        in_prefill = any(holds_kv(sequence) and sequence.in_prefill for sequence in sequences)
        return in_prefill and self._use() >= FULL


def _until(record: RequestRecord, at_s: float | None) -> RequestRecord:
    """The stream while the load was what it was at the switches."""
    times = array("d", (t for t in record.token_times if at_s is None or t <= at_s))
    return replace(record, token_times=times)


# --- the text -----------------------------------------------------------------------------------


def _static_streams(
    workers: Workers, options: Options, run: Run, on_stage: OnStage
) -> list[Answer]:
    """The same streams in one layout, with logits."""
    plans = workers.config.plans
    static = PlanSet(plans.num_ranks, plans.plans, static_plan(options.plans).name)
    driver = workers.driver(replace(workers.config, plans=static, prefix_cache=False))
    streams = run.streams()
    for answer in streams:
        name, prompt = answer.request.request_id, answer.request.prompt
        sampling = structs.replace(answer.request.sampling, return_logits=True)
        driver.submit(Request(name, prompt, sampling, tier="priority", tier_asked="priority"))
    while driver.core.has_work:
        driver.turn()
        num_ended = len(streams) - driver.num_active
        on_stage(f"Without switches, in {static.initial}", num_ended, len(streams))
    return [driver.answers[answer.request.request_id] for answer in streams]


def compare_text(result: Result, streams: list[Answer], static: list[Answer]) -> None:
    """Fill in how many texts are the same, and which are different without an excuse."""
    for ours, other in zip(streams, static, strict=True):
        place = first_difference(ours.tokens, other.tokens)
        if place is None:
            result.num_same += 1
        elif place < len(other.logits) and best_two_gap(other.logits[place]) < CLOSE_LOGITS:
            result.num_close += 1
        else:
            result.different.append(f"{ours.request.request_id} from token {place} on")
