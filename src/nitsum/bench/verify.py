"""A proof that switching changes nothing: the same requests with switches, without, and elsewhere.

switched    random requests, random switches, a nearly full arena
static      the same workers, requests and tokens; one layout, no switch, no prefix cache
reference   Hugging Face transformers on the same weights and tokens
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

from msgspec import structs

from nitsum.bench.driver import Answer, Driver, Workers
from nitsum.bench.moved import MoveWatch, holds_kv, state_of
from nitsum.bench.parity import STATES, Report, compare, compare_rounded
from nitsum.bench.reference import HfModel
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
from nitsum.bench.stages import OnStage
from nitsum.config import EngineConfig
from nitsum.errors import ConfigError
from nitsum.messages import SwitchReport
from nitsum.plan import Group, PlanSet
from nitsum.request import Request
from nitsum.sequence import Sequence

Note = Callable[[str], None]
"""Takes a sentence about the start."""

MIN_PAUSED = 2
"""Paused requests wanted then; some go on before the switch gets to them."""
DISPLACE_TURNS = 5
"""An urgent request arrives this often until so many are paused."""
PATIENCE_TURNS = 40
"""A due switch waits so long for requests in prefill, in decode and paused in the lanes it empties.
"""


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
        return not (all(watch.moved[state] for state in STATES) and watch.num_prefix_hits)

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
    for state in STATES:
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
