"""A proof that switching changes nothing: the same requests with switches, without, and elsewhere.

switched    random requests, random switches, a nearly full arena
static      the same workers, requests and tokens; one layout, no switch, no prefix cache
reference   Hugging Face transformers on the same weights and tokens
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

from msgspec import structs

from nitsum.bench.driver import Answer, Driver, Workers
from nitsum.bench.moved import MoveWatch, holds_kv, state_of
from nitsum.bench.reference import Difference, HfModel, from_bytes
from nitsum.bench.scenario import (
    MAX_BATCH_TOKENS,
    Ask,
    Scenario,
    asks,
    num_active,
    plan_walk,
    static_plan,
    urgent,
)
from nitsum.config import EngineConfig
from nitsum.errors import ConfigError
from nitsum.messages import SwitchReport
from nitsum.plan import Group, PlanSet
from nitsum.request import Request, Sequence

Verdict = Literal["pass", "fail", "not proven"]
OnStage = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""
Note = Callable[[str], None]
"""Takes a sentence about the start."""

MIN_PAUSED = 2
"""Paused requests wanted then; some go on before the switch gets to them."""
DISPLACE_TURNS = 5
"""An urgent request arrives this often until so many are paused."""
PATIENCE_TURNS = 40
"""A due switch waits so long for requests in prefill, in decode and paused in the lanes it empties.
"""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that pass."""

    nll: float
    """Mean negative log-likelihood, nats per token."""
    logits: float
    """max |difference| / max |logit| of a position."""


TOLERANCES = {"float32": Tolerance(nll=1e-4, logits=1e-3)}
"""By dtype. Float32 sums in another order differ by about 1e-6 a layer; the bounds leave two orders
of magnitude, and a swapped head or a stale block is two orders beyond them."""


ROUNDING_RATIO = 1.5
"""In 16-bit types: our error against float32 over that of `transformers` in the same type."""
REQUEST_ROUNDING_RATIO = 3.0
"""The same of each request alone, which a fault in one of them cannot hide from."""


@dataclass
class Report:
    """What was done and what came of it."""

    num_switches: int = 0
    num_requests: int = 0
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    moved: Counter[str] = field(default_factory=Counter[str])
    num_handed_over: int = 0
    num_prefix_hits: int = 0
    num_cached_blocks: int = 0
    num_recomputed: int = 0
    num_left_behind: int = 0
    bytes_moved: int = 0
    units_in_place: int = 0
    highest_use: float = 0.0
    use_at_switch: float = 0.0
    """Highest mean over the ranks at the start of a switch."""
    against: dict[str, Difference] = field(default_factory=dict[str, Difference])
    tolerance: Tolerance | None = TOLERANCES["float32"]
    """None where results are rounded so much that only `rounding` says what is right."""
    rounding: Difference | None = None
    """Of `transformers` in the engine's dtype, against itself in float32."""
    worst_request_ratio: float = 0.0
    """Largest over requests of our error over that of `rounding`, on the same tokens."""
    errors: list[str] = field(default_factory=list[str])
    """Answers that are wrong or missing before any logits are looked at."""
    unproven: list[str] = field(default_factory=list[str])
    """What was meant to happen and did not."""

    @property
    def verdict(self) -> Verdict:
        if self.errors or not all(self.within(other) for other in self.against.values()):
            return "fail"
        return "not proven" if self.unproven else "pass"

    def within(self, difference: Difference) -> bool:
        """False for NaN too."""
        tolerance = self.tolerance
        if self.rounding is not None:
            near = difference.rms <= ROUNDING_RATIO * self.rounding.rms
            return near and self.worst_request_ratio <= REQUEST_ROUNDING_RATIO
        assert tolerance is not None
        return difference.nll_difference < tolerance.nll and difference.logits <= tolerance.logits

    @property
    def figures(self) -> dict[str, float]:
        differences = {
            f"{measure}_difference_vs_{name}": value
            for name, difference in self.against.items()
            for measure, value in (
                ("nll", difference.nll_difference),
                ("logits", difference.logits),
            )
        }
        return {
            "num_switches": self.num_switches,
            "num_requests": self.num_requests,
            "num_positions": max((d.num_positions for d in self.against.values()), default=0),
            **{f"num_moved_in_{state}": self.moved[state] for state in _STATES},
            "num_handed_over": self.num_handed_over,
            "num_prefix_hits_after_move": self.num_prefix_hits,
            "num_cached_blocks_moved": self.num_cached_blocks,
            "num_recomputed": self.num_recomputed,
            "num_left_behind": self.num_left_behind,
            "moved_bytes": self.bytes_moved,
            "num_units_in_place": self.units_in_place,
            "highest_arena_use_share": self.highest_use,
            "highest_mean_use_at_switch_share": self.use_at_switch,
            **differences,
            **self._rounding_figures,
        }

    @property
    def _rounding_figures(self) -> dict[str, float]:
        if self.rounding is None:
            return {}
        ratios = {
            f"rounding_error_ratio_{name}": difference.rms / self.rounding.rms
            for name, difference in self.against.items()
        }
        return {**ratios, "worst_request_error_ratio": self.worst_request_ratio}


_STATES = ("prefill", "decode", "paused")


def verify(
    config: EngineConfig, plans: PlanSet, scenario: Scenario, on_stage: OnStage, note: Note
) -> Report:
    """Start workers, run everything, compare. `config` is `scenario.engine_config`'s."""
    check_plans(plans)
    with Workers(config, on_progress=note) as workers:
        report, answers = run_switched(workers, plans, scenario, on_stage)
        static = run_static(workers, plans, answers, on_stage)
    model = HfModel(Path(config.model))
    if config.dtype == "float32":
        compare(report, answers, static, model, on_stage)
    else:
        rounded = HfModel(Path(config.model), config.dtype, config.device)
        compare_rounded(report, answers, static, model, rounded, on_stage)
    return report


def check_plans(plans: PlanSet) -> None:
    """Raises `ConfigError` when there is nothing to switch between."""
    if len(plans.plans) < 2:
        raise ConfigError(
            f"There is only one plan ({plans.initial}), hence nothing to switch between. "
            "Raise --ranks or name several --plans."
        )


# --- with switches -----------------------------------------------------------------------------


def run_switched(
    workers: Workers, plans: PlanSet, scenario: Scenario, on_stage: OnStage
) -> tuple[Report, list[Answer]]:
    """Requests under switches; a report without comparisons yet, and the answers."""
    run = _Run(workers, plans, scenario, on_stage)
    while run.goes_on():
        run.refill()
        if run.is_time_to_switch():
            run.switch()
        run.driver.turn()
    return run.report(), list(run.driver.answers.values())


class _Run:
    """The run with switches, one turn at a time."""

    def __init__(
        self, workers: Workers, plans: PlanSet, scenario: Scenario, on_stage: OnStage
    ) -> None:
        self._plans = plans
        self._scenario = scenario
        self._on_stage = on_stage
        self._asked: dict[str, Ask] = {}
        self._asks = asks(scenario, workers.shape.vocab_size)
        self._watch = MoveWatch(self._asked, plans)
        self.driver: Driver = workers.driver(sink=self._watch, watcher=self._watch)
        walk = plan_walk(plans.plans, plans.initial, Random(scenario.seed))
        self._targets = list(islice(walk, scenario.max_switches))
        self._num_started = 0
        self._patience = PATIENCE_TURNS

    def goes_on(self) -> bool:
        return self.driver.core.has_work or self._wants_more()

    def _wants_more(self) -> bool:
        too_few = len(self._asked) < self._scenario.num_requests
        return too_few or self._wants_switch(len(self.driver.reports))

    def _wants_switch(self, num_switches: int) -> bool:
        """Whether that many are too few: not as many as were asked for, or not yet a proof."""
        if num_switches < self._scenario.num_switches:
            return True
        return num_switches < self._scenario.max_switches and self._lacks_proof

    def refill(self) -> None:
        while self.driver.num_active < num_active(self._plans) and self._wants_more():
            self._submit(next(self._asks))

    def _submit(self, ask: Ask) -> None:
        self._asked[ask.request.request_id] = ask
        self.driver.submit(ask.request)

    def _displace(self) -> None:
        """An urgent request more than there is room for: somebody will be paused for it."""
        if self.driver.num_active < num_active(self._plans) + self._plans.num_ranks:
            self._submit(urgent(next(self._asks)))

    def is_time_to_switch(self) -> bool:
        """The next switch is due, none is under way, and requests are in every state."""
        if self.driver.is_switching or not self._wants_switch(self._num_started):
            return False
        share = self._num_ended / self._scenario.num_requests
        if share < self._num_started / (self._scenario.num_switches + 1):
            return False
        if set(self._plans[self._target].groups).issuperset(self._groups):
            return True
        self._patience -= 1
        states = self._states_to_move()
        if states["paused"] < MIN_PAUSED and self._patience % DISPLACE_TURNS == 0:
            self._displace()
        is_ready = states["prefill"] and states["decode"] and states["paused"] >= MIN_PAUSED
        return self._patience < 0 or bool(is_ready)

    @property
    def _target(self) -> str:
        return self._targets[self._num_started]

    @property
    def _groups(self) -> tuple[Group, ...]:
        """Of the plan in force."""
        return self._plans[self.driver.core.status("verify").plan].groups

    @property
    def _lacks_proof(self) -> bool:
        watch = self._watch
        roles = any(plan.has_roles for plan in self._plans.plans)
        if roles and not watch.num_handed_over:
            return True
        return not (all(watch.moved[state] for state in _STATES) and watch.num_prefix_hits)

    @property
    def _num_ended(self) -> int:
        return len(self._asked) - self.driver.num_active

    def _states_to_move(self) -> Counter[str]:
        """States of requests with KV in lanes that the next plan lacks."""
        kept: set[Group | None] = set(self._plans[self._target].groups)
        return Counter(
            state_of(sequence)
            for sequence in self.driver.core.sequences.values()
            if holds_kv(sequence) and sequence.group not in kept and not _is_nearly_decode(sequence)
        )

    def switch(self) -> None:
        target = self._target
        num_switches = max(self._scenario.num_switches, self._num_started + 1)
        self._on_stage(f"Switching to {target}", self._num_started, num_switches)
        self._num_started += 1
        self._patience = PATIENCE_TURNS
        self.driver.switch(target)

    def report(self) -> Report:
        watch, done = self._watch, [report for report in self.driver.reports if report.ok]
        waves = [wave for report in done for wave in report.waves]
        report = Report(
            num_switches=len(done),
            num_requests=len(self._asked),
            kinds=Counter((report.from_plan, report.to_plan) for report in done),
            moved=watch.moved,
            num_handed_over=watch.num_handed_over,
            num_prefix_hits=watch.num_prefix_hits,
            num_cached_blocks=sum(wave.num_cached_blocks for wave in waves),
            num_recomputed=watch.num_recomputed,
            num_left_behind=sum(report.num_left_behind for report in done),
            bytes_moved=sum(wave.bytes_moved for wave in waves),
            units_in_place=sum(wave.units_in_place for wave in waves),
            highest_use=watch.highest_use,
            use_at_switch=max(watch.use_at_switch, default=0.0),
        )
        report.errors = [*_failed_switches(self.driver.reports), *_bad_answers(self.driver)]
        report.errors += ["The workers were restarted."] * watch.num_restarts
        report.unproven = list(_missing(report, self._scenario))
        if any(plan.has_roles for plan in self._plans.plans) and not report.num_handed_over:
            report.unproven.append("no prefill lane handed a request over")
        return report


def _is_nearly_decode(sequence: Sequence) -> bool:
    """It would have computed its prompt before anything could move it."""
    num_left = sequence.num_prompt - sequence.num_dispatched
    return 0 < num_left <= 3 * MAX_BATCH_TOKENS


def _failed_switches(reports: list[SwitchReport]) -> Iterator[str]:
    for report in reports:
        if not report.ok:
            yield f"A switch from {report.from_plan} to {report.to_plan} failed: {report.message}"


def _bad_answers(driver: Driver) -> Iterator[str]:
    for request_id, answer in driver.answers.items():
        sampling = answer.request.sampling
        if answer.error is not None:
            yield f"{request_id} ended in an error: {answer.error}"
        elif len(answer.tokens) != sampling.max_tokens or answer.finish_reason != "length":
            yield f"{request_id} has {len(answer.tokens)} tokens, not {sampling.max_tokens}."
        elif len(answer.logits) != len(answer.tokens):
            yield f"{request_id} has logits of {len(answer.logits)} of {len(answer.tokens)} tokens."
        elif sampling.forced_tokens and answer.tokens != list(sampling.forced_tokens):
            yield f"{request_id} does not have the tokens it was told."


def _missing(report: Report, scenario: Scenario) -> Iterator[str]:
    """What a proof needs and this run lacks."""
    if report.num_switches < scenario.num_switches:
        yield f"only {report.num_switches} of {scenario.num_switches} switches happened"
    for state in _STATES:
        if not report.moved[state]:
            yield (
                f"no request was moved in {state}"
                if state != "paused"
                else ("no request was moved while it was paused")
            )
    if not report.num_prefix_hits:
        yield "no request began with a cached prefix that a switch had moved"
    if not report.bytes_moved:
        yield "no KV was copied"


# --- without -----------------------------------------------------------------------------------


def run_static(
    workers: Workers, plans: PlanSet, answers: list[Answer], on_stage: OnStage
) -> list[Answer]:
    """The same requests and tokens in one layout, by the same workers."""
    plan_set = PlanSet(plans.num_ranks, workers.config.plans.plans, static_plan(plans).name)
    config = replace(workers.config, plans=plan_set, prefix_cache=False)
    driver = workers.driver(config)
    for answer in answers:
        driver.submit(_told(answer))
    while driver.core.has_work:
        driver.turn()
        num_ended = len(answers) - driver.num_active
        on_stage(f"Without switches, in {plan_set.initial}", num_ended, len(answers))
    return [driver.answers[answer.request.request_id] for answer in answers]


def _told(answer: Answer) -> Request:
    """The request again, with every token of its answer given."""
    request = answer.request
    sampling = structs.replace(request.sampling, forced_tokens=tuple(answer.tokens))
    return Request(request.request_id, request.prompt, sampling, tier=request.tier)


# --- comparing ---------------------------------------------------------------------------------


def compare(
    report: Report, answers: list[Answer], static: list[Answer], model: HfModel, on_stage: OnStage
) -> None:
    """Fill in the report's differences to the static layout and to transformers."""
    against_hf, against_static = Difference(), Difference()
    report.against = {"transformers": against_hf, "static": against_static}
    for number, (answer, other) in enumerate(zip(answers, static, strict=True)):
        on_stage("Comparing with transformers", number, len(answers))
        name, tokens = answer.request.request_id, answer.tokens
        if not tokens or len(answer.logits) != len(tokens):
            continue  # reported already
        ours = from_bytes(answer.logits)
        against_hf.add(name, tokens, ours, model.answer_logits(answer.request.prompt, tokens))
        if len(other.logits) != len(tokens):
            report.errors.append(f"{name} has no complete answer in the static layout.")
        else:
            against_static.add(name, tokens, ours, from_bytes(other.logits))
    on_stage("Comparing with transformers", len(answers), len(answers))


def compare_rounded(
    report: Report,
    answers: list[Answer],
    static: list[Answer],
    exact: HfModel,
    rounded: HfModel,
    on_stage: OnStage,
) -> None:
    """Ours, with switches and without, and `transformers` in our dtype, all against float32."""
    report.tolerance, report.rounding = None, Difference()
    report.against = {"transformers": Difference(), "static": Difference()}
    for number, (answer, other) in enumerate(zip(answers, static, strict=True)):
        on_stage("Comparing with transformers", number, len(answers))
        name, tokens = answer.request.request_id, answer.tokens
        if not tokens or len(answer.logits) != len(tokens) or len(other.logits) != len(tokens):
            report.errors.append(f"{name} has no complete answer in both layouts.")
            continue
        wanted = exact.answer_logits(answer.request.prompt, tokens)
        theirs = rounded.answer_logits(answer.request.prompt, tokens)
        alone, rounding = Difference(), Difference()
        for difference in (report.against["transformers"], alone):
            difference.add(name, tokens, from_bytes(answer.logits), wanted)
        for difference in (report.rounding, rounding):
            difference.add(name, tokens, theirs, wanted)
        report.against["static"].add(name, tokens, from_bytes(other.logits), wanted)
        ratio = alone.rms / rounding.rms
        report.worst_request_ratio = max(
            report.worst_request_ratio, math.inf if math.isnan(ratio) else ratio
        )
    on_stage("Comparing with transformers", len(answers), len(answers))
