"""What a request is held to: the target rule of a benchmark, fixed in a file before the run.

TTFT: max(100 ms, k x the lone prefill time of that prompt length at the smallest fitting degree),
k = 3 for priority and 10 for default. TPOT: 1.5 x the lone time per token for priority, the time
per token at batch 128 for default. Flex and batch: a deadline for the whole answer.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from nitsum.errors import ApiError, ConfigError
from nitsum.metrics.records import RequestRecord
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape
from nitsum.tier import Tier, TierSet

DECODE_CONTEXT_TOKENS = 1024
LARGE_BATCH = 128
_LONGEST_BIT = 17


class Target(NamedTuple):
    """All that are named must be met; None is no promise."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None


class StepTimes(Protocol):
    """The part of a cost model that the rule needs."""

    def step_time(self, lane: Lane, batch: BatchShape) -> float: ...


class TierRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tier's promise."""

    k: float | None = None
    """TTFT in lone prefill times."""
    tpot_s: float | None = None
    deadline_s: float | None = None


class Targets(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file: rules by tier, and the lone prefill times they refer to."""

    source: str
    """Model, machine, degree and cost model behind the times."""
    least_ttft_s: float = 0.1
    prefill: list[tuple[int, float]]
    """(prompt tokens, lone prefill seconds), ascending."""
    tiers: dict[str, TierRule]

    def of(self, tier: str, num_prompt: int) -> Target:
        """The target of a request; raises `ConfigError` for a tier without a rule."""
        rule = self.tiers.get(tier)
        if rule is None:
            known = ", ".join(self.tiers)
            raise ConfigError(f"The targets have no rule for tier {tier!r}, only for {known}.")
        ttft_s = None
        if rule.k is not None:
            ttft_s = max(self.least_ttft_s, rule.k * self.prefill_s(num_prompt))
        return Target(ttft_s, rule.tpot_s, rule.deadline_s)

    def of_record(self, record: RequestRecord) -> Target:
        """By the tier it asked for: a downgrade does not lower the bar."""
        return self.of(record.tier_asked, record.num_prompt)

    def prefill_s(self, num_prompt: int) -> float:
        """Lone prefill time, linear between the measured lengths and beyond them."""
        i = min(
            max(bisect_right(self.prefill, (num_prompt, float("inf"))), 1), len(self.prefill) - 1
        )
        (x0, y0), (x1, y1) = self.prefill[i - 1], self.prefill[i]
        return y0 + (y1 - y0) * (num_prompt - x0) / (x1 - x0)

    def with_k(self, factor: float) -> Targets:
        """The same with every k multiplied: report 0.5 and 2 beside 1."""
        tiers = {
            name: msgspec.structs.replace(rule, k=None if rule.k is None else rule.k * factor)
            for name, rule in self.tiers.items()
        }
        return msgspec.structs.replace(self, tiers=tiers)


def own_target(record: RequestRecord) -> Target:
    """What the server held the request to when it arrived."""
    return Target(record.ttft_target_s, record.tpot_target_s, record.deadline_s)


def promised(tier: str) -> Target:
    """What a tier of this name promises unless a server says otherwise; nothing if unknown."""
    try:
        found = TierSet().resolve(tier)
    except ApiError:
        return Target()
    return Target(found.ttft_s, found.tpot_s, found.deadline_s)


def promised_words() -> str:
    """`priority 0.3 s and 50 ms a token, ...`: what `promised` says, for people."""
    return ", ".join(
        f"{tier.name} {tier.deadline_s:g} s in all"
        if tier.ttft_s is None or tier.tpot_s is None
        else f"{tier.name} {tier.ttft_s:g} s and {1e3 * tier.tpot_s:g} ms a token"
        for tier in TierSet().ordered
    )


def held_to(tiers: tuple[Tier, ...], targets: Targets) -> tuple[Tier, ...]:
    """Tiers that promise what the run is judged by; TTFT follows with every request."""
    return tuple(_held_to(tier, targets) for tier in tiers)


def _held_to(tier: Tier, targets: Targets) -> Tier:
    rule = targets.tiers.get(tier.name)
    if rule is None:
        return tier
    ttft_s = None if rule.k is None else targets.least_ttft_s
    return replace(tier, ttft_s=ttft_s, tpot_s=rule.tpot_s, deadline_s=rule.deadline_s)


def default_targets(cost: StepTimes, degree: int, source: str) -> Targets:
    """The default rule, from lone steps at `degree`, the smallest that fits the model."""
    lane = Lane(Group(degree, 0))

    def prefill_s(num_tokens: int) -> float:
        return cost.step_time(
            lane, BatchShape(0, 0, num_tokens, num_tokens * (num_tokens + 1) // 2, 1)
        )

    def decode_s(num: int) -> float:
        return cost.step_time(lane, BatchShape(num, num * DECODE_CONTEXT_TOKENS, 0, 0, num))

    return Targets(
        source=source,
        prefill=[(n, prefill_s(n)) for n in _prompt_lengths()],
        tiers={
            "priority": TierRule(k=3.0, tpot_s=1.5 * decode_s(1)),
            "default": TierRule(k=10.0, tpot_s=decode_s(LARGE_BATCH)),
            "flex": TierRule(deadline_s=600.0),
            "batch": TierRule(deadline_s=1800.0),
        },
    )


def _prompt_lengths() -> list[int]:
    """1, 64, 96, 128, 192, ... 131,072: two an octave."""
    octaves = [n for bit in range(6, _LONGEST_BIT) for n in (1 << bit, 3 << (bit - 1))]
    return [1, *octaves, 1 << _LONGEST_BIT]


def save_targets(targets: Targets, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(targets), indent=1) + b"\n")


def load_targets(path: Path) -> Targets:
    """Read a targets file; raises `ConfigError` saying what is wrong with it."""
    try:
        targets = msgspec.json.decode(path.read_bytes(), type=Targets)
    except OSError as error:
        raise ConfigError(f"Cannot read targets {path}: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"Targets {path}: {error}.") from error
    if len(targets.prefill) < 2 or targets.prefill != sorted(targets.prefill):
        raise ConfigError(f"Targets {path}: prefill needs at least two rising lengths.")
    return targets
