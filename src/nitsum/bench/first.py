"""Whether the first request of a class pays for anything that later ones do not.

A class is a tier in a plan. Lone requests, each with a prompt of its own, go through all classes
round by round; what would be made at first use is made in the first round:

    round 0   TP2: priority, default, ...   2xTP1: priority, default, ...   first of their class
    round 1   TP2: priority, default, ...   2xTP1: priority, default, ...   compared with the
    ...                                                                     median of these

Workers are started anew several times, since one first request may be slow by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Literal

from nitsum.bench.driver import Driver, Workers
from nitsum.bench.stages import OnStage
from nitsum.config import EngineConfig
from nitsum.limits import STEP_LIMITS, StepLimits
from nitsum.messages import Device, Dtype
from nitsum.metrics.percentiles import percentile
from nitsum.plan import PlanSet
from nitsum.request import Request, SamplingParams

NUM_ANSWER = 4


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Path
    plans: PlanSet
    device: Device = "cpu"
    dtype: Dtype = "float32"
    load_format: Literal["auto", "dummy"] = "auto"
    num_prompt: int = 256
    num_rounds: int = 20
    """After the first one."""
    num_starts: int = 3
    seed: int = 0

    @property
    def limits(self) -> StepLimits:
        return STEP_LIMITS[self.device]


@dataclass(frozen=True)
class ClassTimes:
    """First tokens of one class, seconds."""

    plan: str
    tier: str
    first_s: list[float]
    """Of the first request after each start."""
    later_s: list[float]

    @property
    def median_s(self) -> float:
        """Of all but the first ones."""
        return median(self.later_s)

    @property
    def ratio(self) -> float:
        """First ones, in the median of starts, over the median of the others."""
        return median(self.first_s) / self.median_s

    @property
    def noise(self) -> float:
        """The 90th percentile of the others over their median: what one of them may take."""
        return percentile(sorted(self.later_s), 0.9) / self.median_s


@dataclass(frozen=True)
class Result:
    classes: list[ClassTimes]
    """In the order of their first requests."""

    @property
    def worst(self) -> ClassTimes:
        return max(self.classes, key=lambda each: each.ratio)

    def figures(self) -> dict[str, float]:
        later = [ttft_s for each in self.classes for ttft_s in each.later_s]
        return {
            "first_request_ttft_ratio": self.worst.ratio,
            "first_request_ttft_ratio_of_all": self.classes[0].ratio,
            "first_request_ttft_ratio_median": median(each.ratio for each in self.classes),
            "later_request_ttft_p90_ratio": max(each.noise for each in self.classes),
            "first_request_ttft_ms": 1e3 * median(self.worst.first_s),
            "ttft_ms": 1e3 * median(later),
            "num_classes": len(self.classes),
        }


def measure(options: Options, on_stage: OnStage, note: Callable[[str], None]) -> Result:
    """Workers started for this, so that nobody was served before."""
    result = Result(classes_of(options))
    for number in range(options.num_starts):
        on_stage("Starts", number, options.num_starts)
        with Workers(engine_config(options), on_progress=note) as workers:
            serve_all(result, options, workers.driver(), workers.shape.vocab_size, on_stage)
    return result


def engine_config(options: Options) -> EngineConfig:
    """As a server's, with room for what runs at once: one request."""
    return EngineConfig(
        model=str(options.model),
        plans=options.plans,
        device=options.device,
        dtype=options.dtype,
        load_format=options.load_format,
        kv_bytes=0 if options.device == "cuda" else EngineConfig.kv_bytes,
        block_tokens=options.limits.block_tokens,
        max_num_seqs=options.limits.max_num_seqs,
        max_batch_tokens=options.limits.max_batch_tokens,
        max_mixed_tokens=options.limits.max_mixed_tokens,
        seed=options.seed,
    )


def classes_of(options: Options) -> list[ClassTimes]:
    """In the order in which they are served: the initial plan's first."""
    plans = sorted(options.plans.plans, key=lambda plan: plan.name != options.plans.initial)
    tiers = [tier.name for tier in engine_config(options).tiers]
    return [ClassTimes(plan.name, tier, [], []) for plan in plans for tier in tiers]


def serve_all(
    result: Result, options: Options, driver: Driver, vocab_size: int, on_stage: OnStage
) -> None:
    """All rounds on a driver that has served nobody."""
    random = Random(options.seed)
    for number in range(options.num_rounds + 1):
        on_stage("Rounds", number, options.num_rounds + 1)
        for each in result.classes:
            if driver.core.status("first").plan != each.plan:
                driver.switch(each.plan)
                driver.run()
            prompt = random.choices(range(vocab_size), k=options.num_prompt)
            ttft_s = _lone_ttft_s(driver, prompt, each.tier)
            (each.later_s if number else each.first_s).append(ttft_s)


def _lone_ttft_s(driver: Driver, prompt: list[int], tier: str) -> float:
    name = f"r{len(driver.answers)}"
    sampling = SamplingParams(max_tokens=NUM_ANSWER, temperature=0.0)
    started_s = driver.clock.now()
    request = Request(name, prompt, sampling, arrival_s=started_s, tier=tier, tier_asked=tier)
    driver.submit(request)
    driver.settle()
    return driver.answers[name].times_s[0] - started_s
