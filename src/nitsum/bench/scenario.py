"""What a verification asks of the engine: requests, tiers, an arena that is nearly full, plans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from msgspec import structs

from nitsum.config import EngineConfig
from nitsum.messages import Device, Dtype, Fault
from nitsum.plan import Plan, PlanSet, parse_plan
from nitsum.request import Request, SamplingParams
from nitsum.shape import Geometry, ModelShape, round_up
from nitsum.shared import DTYPE_BYTES
from nitsum.tier import Tier

TIERS = tuple(
    Tier(name, level, deadline_s=1e6, max_wait_s=1e6)
    for level, name in enumerate(("priority", "default", "batch"))
)
"""Levels that displace each other, and promises that the slowest machine keeps."""
_TIER_WEIGHTS = (0.25, 0.25, 0.5)

MAX_NUM_SEQS = 3
"""Few, so that an urgent request finds its lane full and displaces another."""
MAX_BATCH_TOKENS = 16
"""Little, so that a prompt takes several steps and a switch finds it half computed."""
_USUAL_SHARE = 0.8
"""A usual request's blocks over the longest one's."""
NUM_FAMILIES = 4
"""Groups of requests that share a prefix."""


@dataclass(frozen=True)
class Scenario:
    """The size of a verification. The same seed asks for the same requests in the same order."""

    num_switches: int = 20
    """At least; more are made while some state has not been moved, up to `max_switches`."""
    num_requests: int = 48
    """At least; more are made when these end before the last switch does."""
    max_tokens: int = 160
    """Longest prompt plus answer."""
    block_tokens: int = 16
    seed: int = 0

    @property
    def max_switches(self) -> int:
        return 2 * self.num_switches + 10


@dataclass(frozen=True)
class Ask:
    """A request, and the family whose prefix it begins with."""

    request: Request
    family: int | None
    num_prefix: int
    """Length of that prefix."""


def asks(scenario: Scenario, vocab_size: int) -> Iterator[Ask]:
    """Requests without end.

    Half of them are told every token of their answer; the others draw theirs, so that a drawn token
    that gets lost on the way between two lanes shows in all logits after it.
    """
    random = Random(scenario.seed)
    prefixes = [_prefix(scenario, random, vocab_size) for _ in range(NUM_FAMILIES)]
    number = 0
    while True:
        yield _ask(scenario, random, vocab_size, prefixes, number)
        number += 1


def _prefix(scenario: Scenario, random: Random, vocab_size: int) -> list[int]:
    longest = max(1, scenario.max_tokens // 3 // scenario.block_tokens)
    num_tokens = scenario.block_tokens * random.randint(1, longest)
    return random.choices(range(vocab_size), k=num_tokens)


def _ask(
    scenario: Scenario, random: Random, vocab_size: int, prefixes: list[list[int]], number: int
) -> Ask:
    family = random.randrange(len(prefixes)) if random.random() < 0.6 else None
    prefix = [] if family is None else prefixes[family]
    num_answer = random.randint(scenario.max_tokens // 16, scenario.max_tokens // 4)
    longest = scenario.max_tokens - num_answer - len(prefix)
    prompt = prefix + random.choices(range(vocab_size), k=random.randint(1, longest))
    forced = random.choices(range(vocab_size), k=num_answer) if random.random() < 0.5 else []
    sampling = SamplingParams(
        max_tokens=num_answer,
        seed=random.getrandbits(32),
        forced_tokens=tuple(forced),
        return_logits=True,
    )
    tier = random.choices([tier.name for tier in TIERS], _TIER_WEIGHTS)[0]
    request = Request(f"r{number}", prompt, sampling, tier=tier, tier_asked=tier)
    return Ask(request, family, len(prefix))


def urgent(ask: Ask) -> Ask:
    """The same request, in the highest tier."""
    tier = TIERS[0].name
    return replace(ask, request=structs.replace(ask.request, tier=tier, tier_asked=tier))


def plan_walk(plans: tuple[Plan, ...], current: str, random: Random) -> Iterator[str]:
    """Plans to switch to, at random among the changes made least often so far."""
    counts = {(a.name, b.name): 0 for a in plans for b in plans if a is not b}
    while True:
        fewest = min(count for (a, _), count in counts.items() if a == current)
        choices = [b for (a, b), count in counts.items() if a == current and count == fewest]
        target = random.choice(choices)
        counts[current, target] += 1
        yield (current := target)


def static_plan(plans: PlanSet) -> Plan:
    """The narrowest uniform layout of these degrees, one of `plans` or not."""
    degree, num_lanes = plans.degrees[0], plans.num_ranks // plans.degrees[0]
    name = f"TP{degree}" if num_lanes == 1 else f"{num_lanes}xTP{degree}"
    uniform = parse_plan(name, plans.num_ranks)
    alike = (p for p in plans.plans if set(p.groups) == set(uniform.groups) and not p.has_roles)
    return next(alike, uniform)


def with_static(plans: PlanSet) -> PlanSet:
    """The plans and their static reference, which needs groups of its own if it is not one."""
    static = static_plan(plans)
    if static in plans.plans:
        return plans
    return PlanSet(plans.num_ranks, (*plans.plans, static), plans.initial)


def engine_config(
    model: Path,
    plans: PlanSet,
    scenario: Scenario,
    *,
    min_tp: int = 1,
    fault: Fault | None = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> EngineConfig:
    """An engine that `asks` keep nearly full."""
    shape = ModelShape.from_folder(model)
    return EngineConfig(
        model=str(model),
        plans=with_static(plans),
        min_tp=min_tp,
        device=device,
        dtype=dtype,
        kv_bytes=_kv_bytes(shape, plans, min_tp, scenario, dtype),
        block_tokens=scenario.block_tokens,
        max_model_len=scenario.max_tokens,
        max_num_seqs=MAX_NUM_SEQS,
        max_batch_tokens=MAX_BATCH_TOKENS,
        tiers=TIERS,
        timeout_s=120.0,
        precopy_units=32,
        check_accounting=True,
        fault=fault,
    )


def num_active(plans: PlanSet) -> int:
    """Requests kept in the engine: every lane of the narrowest plan full, and some that wait."""
    return MAX_NUM_SEQS * plans.num_ranks // plans.degrees[0] + plans.num_ranks


def _kv_bytes(
    shape: ModelShape, plans: PlanSet, min_tp: int, scenario: Scenario, dtype: Dtype
) -> int:
    """Of a narrowest lane: a full batch of usual requests and a paused one hardly fit."""
    geometry = Geometry(shape, plans.max_tp, min_tp)
    longest = math.ceil(scenario.max_tokens / scenario.block_tokens)
    num_blocks = round(longest * _USUAL_SHARE * (MAX_NUM_SEQS + 1))
    num_units = num_blocks * geometry.units_per_page(plans.degrees[0])
    unit_bytes = geometry.unit_bytes(scenario.block_tokens, DTYPE_BYTES[dtype])
    return round_up(num_units, geometry.num_units) * unit_bytes
