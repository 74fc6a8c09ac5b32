"""Long random lives in a small, full arena: fragmentation, sharing, switch after switch."""

import random
from dataclasses import replace

import pytest

from nitsum.events import HandedOver
from nitsum.messages import Move
from nitsum.plan import PlanSet, parse_plan
from nitsum.tier import DEFAULT_TIERS
from tests.unit.engine.machine import Machine

TIERS = ("priority", "default", "flex", "batch")


def count_relocations(machine: Machine) -> list[int]:
    """Counts moves inside one rank that no switch asked for, as they are sent."""
    counts = [0]
    send = machine.executor.send

    def counting(ranks, message):
        if isinstance(message, Move) and not message.rows:
            counts[0] += [pull.src_rank for pull in message.pulls] == list(ranks)
        send(ranks, message)

    machine.executor.send = counting  # type: ignore[method-assign]
    return counts


def soak(machine: Machine, seed: int, num_turns: int, num_live: int) -> list[float]:
    """Keep `num_live` requests alive, switch and abort now and then; the arena's use over time."""
    rng = random.Random(seed)
    names = [plan.name for plan in machine.plans.plans]
    longest = machine.arena.num_units // machine.arena.units_per_block * 4 // 3
    used: list[float] = []
    for _ in range(num_turns):
        live = list(machine.core.sequences)
        if len(live) < num_live:
            shared = [7] * rng.choice([0, 0, 4, 8, 16])
            prompt = shared + [rng.randrange(4) for _ in range(rng.randint(1, longest))]
            tier = rng.choice(TIERS)
            machine.submit(prompt, rng.randint(1, 24), tier, stop_token_ids=(3,))
        if rng.random() < 0.02 and live:
            machine.abort(rng.choice(live))
        if rng.random() < 0.05:
            machine.switch(rng.choice(names))
        if rng.random() < 0.02:
            machine.core.generation.switcher.cancel_wave("at random")
        machine.turn()
        used.append(machine.core.generation.kv.used_share(0))
    return used


@pytest.mark.parametrize("seed", range(12))
def test_soak(seed: int):
    num_ranks = random.Random(seed).choice([2, 4, 4, 8])
    units = num_ranks // random.Random(seed + 1).choice([1, 1, 2])
    machine = Machine(num_ranks, seed=seed, num_blocks=24, units_per_block=units)
    soak(machine, seed, num_turns=400, num_live=4 * num_ranks)
    machine.drain()


@pytest.mark.parametrize("seed", range(4))
def test_soak_with_roles(seed: int):
    names = ("TP2-prefill+2xTP1-decode", "TP4", "2xTP1-prefill+TP2-decode", "4xTP1")
    plans = PlanSet(4, tuple(parse_plan(name, 4) for name in names), names[0])
    machine = Machine(4, seed=seed, num_blocks=24, plans=plans)
    soak(machine, seed, num_turns=400, num_live=8)
    machine.drain()
    assert sum(isinstance(event, HandedOver) for event in machine.log.events) > 0


def test_soak_reaches_what_it_is_for():
    """The arena is really full, and room is really made by moving pages: over a few lives, as one
    may have it easy. Nobody is late here: late prompts would give their room back."""
    tiers = tuple(replace(tier, ttft_s=60.0) if tier.ttft_s else tier for tier in DEFAULT_TIERS)
    used: list[float] = []
    num_relocations = num_switches = 0
    for seed in range(10):
        machine = Machine(4, seed=seed, num_blocks=24, tiers=tiers)
        relocations = count_relocations(machine)
        used += soak(machine, seed, num_turns=250, num_live=16)
        machine.drain()
        num_relocations += relocations[0]
        num_switches += sum(report.ok for report in machine.reports)
        for wave in (wave for report in machine.reports for wave in report.waves):
            assert min(wave.propose_s, wave.precopy_s, wave.cutover_s) >= 0
    assert sum(used) / len(used) > 0.5
    assert max(used) > 0.95
    assert num_relocations > 10
    assert num_switches > 20
