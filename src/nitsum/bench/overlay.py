"""What it costs lanes to take turns on the same ranks.

A TP 2 lane over two TP 1 lanes, each with as many greedy sequences; then the TP 2 lane alone.

    rank 0   | TP2 | TP1@0 | TP2 | TP1@0 | ...      idle: between the end of one and the next
    rank 1   | TP2 | TP1@1 | TP2 | TP1@1 | ...      skew: how much longer TP2 takes than alone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Literal

from nitsum.bench.driver import Driver, Workers
from nitsum.bench.stages import OnStage
from nitsum.config import EngineConfig
from nitsum.errors import NitsumError
from nitsum.limits import STEP_LIMITS
from nitsum.messages import FromWorker, StepDone
from nitsum.metrics.percentiles import percentile
from nitsum.metrics.records import Recorder, StepRecord
from nitsum.plan import PlanSet, parse_plan
from nitsum.request import Request, SamplingParams
from nitsum.tier import Tier

PLAN = "TP2/2xTP1"
TIERS = (
    Tier("priority", 0, deadline_s=1e6, max_wait_s=1e6),
    Tier("batch", 1, deadline_s=1e6, max_wait_s=1e6),
)
NUM_PROMPT = 512
NUM_ALONE = 100
"""Tokens of the wide lane before the others begin."""
STEPS_PER_TURN = 2
"""Of all ranks: a turn on rank 0 is half a round of three."""
SETTLE_TURNS = 20
"""Left out at the start: prompts are still being computed."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Path
    num_turns: int = 1000
    num_seqs: int = 8
    """Of each lane."""
    load_format: Literal["auto", "dummy"] = "dummy"
    seed: int = 0


def measure(options: Options, on_stage: OnStage, note: Callable[[str], None]) -> dict[str, float]:
    """Figures by name. Needs two GPUs."""
    with Workers(engine_config(options), on_progress=note) as workers:
        return _Run(options, workers, on_stage).figures()


def engine_config(options: Options) -> EngineConfig:
    plan = parse_plan(PLAN, 2)
    return EngineConfig(
        model=str(options.model),
        plans=PlanSet(2, (plan,), plan.name),
        device="cuda",
        dtype="bfloat16",
        load_format=options.load_format,
        block_tokens=STEP_LIMITS["cuda"].block_tokens,
        kv_bytes=0,
        max_model_len=NUM_PROMPT + NUM_ALONE + 4 * options.num_turns,
        max_num_seqs=2 * options.num_seqs,
        max_batch_tokens=NUM_PROMPT,
        tiers=TIERS,
        seed=options.seed,
    )


class _Run:
    """One engine, and what rank 0 says of its steps."""

    def __init__(self, options: Options, workers: Workers, on_stage: OnStage) -> None:
        self._options = options
        self._on_stage = on_stage
        self._recorder = Recorder()
        self._executor = workers.executor
        self._driver: Driver = workers.driver(sink=self._recorder)
        self._vocab = range(workers.shape.vocab_size)
        self._random = Random(options.seed)
        self._idle_s: dict[int, float] = {}
        self._listen()

    def figures(self) -> dict[str, float]:
        wide = self._submit("priority")
        self._until(lambda: self._num_tokens(wide) >= NUM_ALONE)
        alone_s = median(step.seconds for step in self._steps_of_rank_0()[-NUM_ALONE // 2 :])
        first = len(self._recorder.steps)
        self._on_stage("Turns", 0, self._options.num_turns)
        self._submit("batch")
        self._submit("batch")
        enough = first + STEPS_PER_TURN * (self._options.num_turns + 2 * SETTLE_TURNS)
        self._until(lambda: len(self._recorder.steps) >= enough)
        turns = self._turns(first)[: self._options.num_turns]
        idle_us = sorted(1e6 * self._idle_s[step.step_id] for step in turns)
        wide_us = sorted(1e6 * (s.seconds - alone_s) for s in turns if s.group.degree == 2)
        return {
            "overlay_turns": len(turns),
            "overlay_idle_p50_us": median(idle_us),
            "overlay_idle_p99_us": percentile(idle_us, 0.99),
            "overlay_idle_max_us": max(idle_us),
            "overlay_skew_p50_us": median(wide_us),
            "overlay_skew_p99_us": percentile(wide_us, 0.99),
            "overlay_alone_ms_tp2": 1e3 * alone_s,
        }

    def _listen(self) -> None:
        """Keep what steps say of their devices, which the engine has no use for."""
        poll = self._executor.poll

        def listening(timeout_s: float) -> list[FromWorker]:
            replies = poll(timeout_s)
            for reply in replies:
                if isinstance(reply, StepDone):
                    self._idle_s[reply.step_id] = reply.idle_s
            return replies

        self._executor.poll = listening

    def _submit(self, tier: str) -> list[str]:
        sampling = SamplingParams(max_tokens=NUM_ALONE + 3 * self._options.num_turns, temperature=0)
        ids = [f"r{len(self._driver.answers) + i}" for i in range(self._options.num_seqs)]
        for request_id in ids:
            prompt = self._random.choices(self._vocab, k=NUM_PROMPT)
            self._driver.submit(Request(request_id, prompt, sampling, tier=tier, tier_asked=tier))
        return ids

    def _num_tokens(self, ids: list[str]) -> int:
        return min(len(self._driver.answers[request_id].tokens) for request_id in ids)

    def _until(self, done: Callable[[], bool]) -> None:
        self._driver.run(done)
        if not self._driver.core.has_work:
            raise NitsumError("The requests ended before there had been enough turns.")

    def _turns(self, first: int) -> list[StepRecord]:
        """Decode steps of rank 0 that follow one of another lane."""
        steps = self._steps_of_rank_0(first)
        turns = [b for a, b in pairwise(steps) if a.group != b.group and not b.prefill_tokens]
        return turns[SETTLE_TURNS:]

    def _steps_of_rank_0(self, first: int = 0) -> list[StepRecord]:
        """In the order in which they were sent."""
        steps = (step for step in self._recorder.steps[first:] if 0 in step.group.ranks)
        return sorted(steps, key=lambda step: step.step_id)
