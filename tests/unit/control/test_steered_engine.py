"""The controller inside the engine, on a machine that checks every position it reads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from nitsum.control.classes import Shape
from nitsum.control.controller import Controller, Rules
from nitsum.control.load import Load
from nitsum.control.score import Limits, PlanScore, Scorer
from nitsum.control.steps import StepTimes
from nitsum.cost.protocol import FixedCost
from nitsum.engine.core import Core
from nitsum.engine.steering import controller_of, decisions_of
from nitsum.events import PlanDecided, SwitchEnded, SwitchStarted
from nitsum.plan import Plan
from nitsum.tier import TierSet
from tests.unit.engine.machine import Machine

EAGER = Rules(
    window_s=0.02,
    look_s=0.005,
    min_dwell_s=0.0,
    num_agree=1,
    max_switches_per_minute=10_000,
    judge_s=0.1,
)


class Fickle(Scorer):
    """Finds another plan best every time."""

    def __init__(self, degrees: tuple[int, ...], seed: int) -> None:
        limits = Limits(4, 16, lambda degree: 96.0)
        super().__init__(StepTimes(FixedCost(), degrees), limits)
        self.draw = random.Random(seed)

    def score(self, plan: Plan | Shape, load: Load) -> PlanScore:
        return super().score(plan, load)._replace(value=self.draw.random())


def steered(machine: Machine, seed: int) -> Core:
    """The machine's core anew, with a controller that changes its mind all the time."""
    scorer = Fickle(machine.plans.degrees, seed)
    controller = Controller(
        machine.plans, TierSet(machine.config.tiers), scorer, FixedCost(), EAGER
    )
    machine.core = Core(
        machine.config,
        machine.arena,
        machine.executor,
        machine.clock,
        machine.log,
        controller=controller,
    )
    return machine.core


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_right_whatever_the_controller_does(seed: int):
    machine = Machine(4, seed=seed)
    core = steered(machine, seed)
    draw = random.Random(seed)
    for _ in range(40):
        prompt = [draw.randrange(50) for _ in range(draw.randint(1, 30))]
        tier = draw.choice(["priority", "default", "batch"])
        machine.submit(prompt, draw.randint(1, 20), tier)
        for _ in range(draw.randint(0, 12)):
            machine.turn()
    machine.drain()
    ended = [event for event in machine.log.events if isinstance(event, SwitchEnded)]
    assert len(ended) >= 3
    assert core.controller is not None
    assert [d.event for d in decisions_of(core.controller, 5)] == list(core.controller.recent)[-5:]


def test_a_switch_says_why_it_was_made():
    machine = Machine(4)
    steered(machine, 1)
    for _ in range(10):
        machine.submit([1, 2, 3, 4], 20)
        for _ in range(10):
            machine.turn()
    machine.drain()
    started = [event for event in machine.log.events if isinstance(event, SwitchStarted)]
    decided = {e.decision: e for e in machine.log.events if isinstance(e, PlanDecided)}
    assert started
    for event in started:
        decision = decided[int(event.op_id.removeprefix("decision-"))]
        assert (event.to_plan, event.reason) == (decision.chosen, decision.reason)


def test_static_is_the_default():
    machine = Machine(4)
    assert machine.config.controller == "static"
    assert controller_of(machine.config, machine.arena, FixedCost()) is None
    adaptive = replace(machine.config, controller="adaptive")
    assert controller_of(adaptive, machine.arena, FixedCost()) is not None
