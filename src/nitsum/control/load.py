"""What arrives and waits, by tier: the load that plans are scored on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nitsum.tier import Tier, TierSet

NUM_PROBES = 6


class Probe(NamedTuple):
    """One of a few prompts that stand for all of a tier, in equal shares."""

    prompt_tokens: float
    ttft_s: float | None
    """Its target; None: only the deadline counts."""


class Sample(NamedTuple):
    """One request as it arrived, for summing up."""

    prompt_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    deadline_s: float | None


@dataclass(frozen=True, kw_only=True)
class TierLoad:
    """The requests of one tier."""

    tier: str
    level: int
    rate_per_s: float
    """Arrivals."""
    prompt_tokens: float
    """Mean of what has to be computed: hits of the prefix cache are taken off."""
    output_tokens: float
    """Mean."""
    prompt_cv2: float = 1.0
    """Squared coefficient of variation of the prompts."""
    probes: tuple[Probe, ...] = ()
    tpot_s: float | None = None
    deadline_s: float | None = None
    num_waiting: int = 0
    """Requests here already that no step has contained yet."""
    value: float = 1.0
    """Of one request that meets its targets."""
    context_tokens: float = 0.0
    """Mean prompt with cached tokens; 0 takes `prompt_tokens`."""

    @property
    def mean_context_tokens(self) -> float:
        """Of a running request: its whole prompt and half of its answer."""
        return max(self.context_tokens, self.prompt_tokens) + self.output_tokens / 2

    def scaled(self, factor: float) -> TierLoad:
        return replace(self, rate_per_s=self.rate_per_s * factor)


Load = tuple[TierLoad, ...]
"""By level, the most urgent first."""


def sum_up(
    tier: Tier,
    samples: Sequence[Sample],
    *,
    rate_per_s: float,
    output_tokens: float,
    cached_share: float = 0.0,
    num_waiting: int = 0,
    value: float = 1.0,
) -> TierLoad:
    """The load that `samples` (at least one) stand for, arriving at `rate_per_s`."""
    prompts = [sample.prompt_tokens for sample in samples]
    mean = sum(prompts) / len(prompts)
    variance = sum((p - mean) ** 2 for p in prompts) / len(prompts)
    return TierLoad(
        tier=tier.name,
        level=tier.level,
        rate_per_s=rate_per_s,
        prompt_tokens=max(1.0, mean * (1.0 - cached_share)),
        output_tokens=max(1.0, output_tokens),
        prompt_cv2=variance / mean**2,
        probes=_probes(samples, 1.0 - cached_share),
        tpot_s=_least(sample.tpot_s for sample in samples),
        deadline_s=_least(sample.deadline_s for sample in samples),
        num_waiting=num_waiting,
        value=value,
        context_tokens=mean,
    )


def _probes(samples: Sequence[Sample], new_share: float) -> tuple[Probe, ...]:
    """Evenly picked by length, in the middle of equal shares."""
    ordered = sorted(samples)
    num = min(NUM_PROBES, len(ordered))
    picked = (ordered[(2 * i + 1) * len(ordered) // (2 * num)] for i in range(num))
    return tuple(Probe(max(1.0, s.prompt_tokens * new_share), s.ttft_s) for s in picked)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def by_level(loads: Iterable[TierLoad]) -> Load:
    return tuple(sorted(loads, key=lambda load: load.level))


def scaled(load: Load, factor: float) -> Load:
    """The same mix at `factor` times the rate."""
    return tuple(tier.scaled(factor) for tier in load)


def tier_sample(tier: Tier, prompt_tokens: int) -> Sample:
    """A request held to what its tier promises."""
    return Sample(prompt_tokens, tier.ttft_s, tier.tpot_s, tier.deadline_s)


def starvation(tiers: TierSet, load: TierLoad, oldest_wait_s: float) -> float:
    """What the tier's value is multiplied by: doubled once its longest wait is at its bound."""
    return 1.0 + min(1.0, oldest_wait_s / tiers[load.tier].max_wait_s)
