"""When the controller switches, when it does not, and what it says about it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from nitsum.control.controller import Controller, Rules
from nitsum.control.decisions import summary, told, words
from nitsum.control.load import by_level
from nitsum.control.price import Held
from nitsum.control.score import Limits, Scorer
from nitsum.control.steps import StepTimes
from nitsum.cost.protocol import FixedCost
from nitsum.events import (
    AnyEvent,
    Arrived,
    Finished,
    PlanDecided,
    PlanJudged,
    StepEnded,
    SwitchEnded,
)
from nitsum.plan import Group, Lane, Plan, PlanSet, parse_plan
from nitsum.step import BatchShape
from nitsum.tier import TierSet
from tests.unit.control.test_score import tier_load

PLANS = PlanSet(2, (parse_plan("TP2", 2), parse_plan("2xTP1", 2)), "TP2")


class Crossing:
    """Wide lanes have the shorter steps, narrow ones together do 1.6 times as much."""

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        base_s, token_s = (0.005, 80e-6) if lane.degree == 2 else (0.02, 100e-6)
        return base_s + token_s * batch.num_tokens

    def move_time(self, num_bytes: int) -> float:
        return num_bytes / 1e9

    def offload_time(self, num_bytes: int) -> float:
        return num_bytes / 1e9


@dataclass
class World:
    """An engine that does at once what it is told, and keeps what it hears."""

    controller: Controller
    plan: Plan = PLANS.plans[0]
    at_s: float = 0.0
    may_switch: bool = True
    token_bytes: int = 1000
    held_tokens: int = 0
    factors: dict[int, float] = field(default_factory=dict[int, float])
    events: list[AnyEvent] = field(default_factory=list[AnyEvent])
    moves: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    num_requests: int = 0
    late: tuple[float, float] = (0.0, 0.0)
    """From when to when requests arrive that are answered too late."""

    def now(self) -> float:
        return self.at_s

    def emit(self, event: AnyEvent) -> None:
        self.events.append(event)
        self.controller.emit(event)

    def waiting(self) -> list[tuple[str, float]]:
        return []

    def held(self) -> list[Held]:
        return [Held(group, 8, self.held_tokens) for group in self.plan.groups]

    def go_to(self, op_id: str, plan: str, reason: str) -> None:
        before, self.plan = self.plan.name, PLANS[plan]
        self.moves.append((self.at_s, plan))
        self.emit(
            SwitchEnded(
                at_s=self.at_s,
                op_id=op_id,
                from_plan=before,
                to_plan=plan,
                ok=True,
                message="",
                duration_s=0.01,
                bytes_moved=0,
                num_left_behind=0,
            )
        )

    # -- a load --

    def arrive(self, tier: str, prompt: int, output: int, ttft_s: float, tpot_s: float) -> None:
        self.num_requests += 1
        name = f"r{self.num_requests}"
        self.emit(
            Arrived(
                at_s=self.at_s,
                request_id=name,
                tier_asked=tier,
                tier=tier,
                tenant="",
                num_prompt=prompt,
                max_tokens=output,
                arrival_s=self.at_s,
                ttft_target_s=ttft_s,
                tpot_target_s=tpot_s,
            )
        )
        is_late = self.late[0] <= self.at_s < self.late[1]
        first_s = self.at_s + (2.0 * ttft_s if is_late else 0.0)
        ended = StepEnded(
            at_s=first_s, step_id=1, group=Group(1, 0), seconds=0.01, tokens=[(name, 1)]
        )
        self.emit(ended)
        self.emit(
            Finished(
                at_s=self.at_s,
                request_id=name,
                tier=tier,
                reason="length",
                num_output=output,
                num_cached=0,
                group=None,
            )
        )

    def run(self, until_s: float, rate_per_s: float, urgent: bool, seed: int = 0) -> None:
        """Poisson arrivals; urgent ones need the short steps of a wide lane."""
        draw = random.Random(seed)
        next_s = self.at_s
        while self.at_s < until_s:
            self.at_s += 0.05
            while next_s < self.at_s:
                next_s += draw.expovariate(rate_per_s)
                if urgent:
                    self.arrive("priority", 100, 50, 1.0, 0.012)
                else:
                    self.arrive("default", 400, 50, 5.0, 0.5)
            self.controller.tick(self)


def controller(**rules: float) -> Controller:
    steps = StepTimes(Crossing(), [1, 2])
    scorer = Scorer(steps, Limits(64, 512, lambda degree: 1e6))
    return Controller(PLANS, TierSet(), scorer, Crossing(), Rules(**rules))


def flipping(world: World, num_phases: int = 4, phase_s: float = 40.0) -> None:
    for phase in range(num_phases):
        urgent = phase % 2 == 0
        end_s = world.at_s + phase_s
        world.run(end_s, 3.0 if urgent else 45.0, urgent, seed=phase)


def test_the_plan_follows_the_load():
    world = World(controller())
    flipping(world)
    assert [plan for _, plan in world.moves] == ["2xTP1", "TP2", "2xTP1"]
    for (at_s, _), flip_s in zip(world.moves, (40.0, 80.0, 120.0), strict=True):
        assert flip_s < at_s < flip_s + 15.0


def test_a_steady_load_never_switches():
    world = World(controller())
    world.run(120.0, 3.0, urgent=True)
    assert world.moves == []


def test_few_requests_are_no_reason_to_move():
    """The same load, seen in so few that chance may have made it, needs a larger gain."""
    judge = controller()
    world = World(judge)
    world.run(20.0, 3.0, urgent=True)
    few = judge._margin(judge.arrivals.load(world.at_s))
    world.run(60.0, 45.0, urgent=False)
    many = judge._margin(judge.arrivals.load(world.at_s))
    assert 0.05 < many < 0.08 < few < 0.2


def test_a_plan_that_was_never_in_force_is_trusted_like_the_others():
    judge = controller()
    judge.trust = {"TP2": 0.5}
    load = by_level([tier_load("default", 5.0)])
    scores = {name: judge._score(name, load).value for name in ("TP2", "2xTP1")}
    plain = {name: judge.scorer.score(judge.shapes[name], load).value for name in scores}
    assert scores == {name: pytest.approx(0.5 * value) for name, value in plain.items()}


def test_a_plan_is_not_blamed_for_what_it_took_over():
    """Everything is late for some seconds after a switch, as it would be in any plan."""
    world = World(controller(), late=(40.0, 55.0))
    world.run(40.0, 3.0, True)
    world.run(95.0, 45.0, False, seed=1)
    assert [plan for _, plan in world.moves] == ["2xTP1"]
    judged = [event for event in world.events if isinstance(event, PlanJudged)]
    taking_over = next(each for each in judged if each.plan == "2xTP1")
    assert taking_over.realised_per_s < 0.9 * taking_over.predicted_per_s
    assert world.controller.trust.get("2xTP1", 1.0) == 1.0


def test_a_dear_switch_is_not_made():
    world = World(controller(), held_tokens=10**9)
    flipping(world, 2)
    assert world.moves == []
    last = [event for event in world.events if isinstance(event, PlanDecided)][-1]
    assert last.scores[0].switch_cost > last.scores[0].value or "price included" in last.reason


def test_switches_are_bounded_by_the_minute():
    world = World(controller(min_dwell_s=0.0, max_switches_per_minute=2, expected_dwell_s=20.0))
    flipping(world, 8, 12.0)
    times = [at_s for at_s, _ in world.moves]
    assert times
    assert all(sum(at_s <= other < at_s + 60.0 for other in times) <= 2 for at_s in times)


def test_a_minimum_stay_is_kept():
    world = World(controller(min_dwell_s=30.0))
    flipping(world, 8, 12.0)
    times = [at_s for at_s, _ in world.moves]
    assert all(b - a >= 30.0 for a, b in pairwise(times))


def test_nothing_starts_while_a_switch_is_under_way():
    world = World(controller(), may_switch=False)
    flipping(world, 2)
    assert world.moves == []
    assert any("under way" in e.reason for e in world.events if isinstance(e, PlanDecided))


def test_every_decision_names_the_plans_not_taken():
    world = World(controller())
    flipping(world, 2)
    decided = [event for event in world.events if isinstance(event, PlanDecided)]
    assert len(decided) > 50
    for event in decided:
        assert {score.plan for score in event.scores} == {"TP2", "2xTP1"}
        assert [s.value for s in event.scores] == sorted(s.value for s in event.scores)[::-1]
    assert [event.decision for event in decided] == list(range(1, len(decided) + 1))


def test_decisions_are_judged_on_what_came():
    world = World(controller())
    flipping(world, 2)
    judged = [event for event in world.events if isinstance(event, PlanJudged)]
    assert judged
    assert all(event.regret >= 0.0 for event in judged)
    steady = judged[0]
    assert steady.regret == pytest.approx(0.0)
    assert steady.realised_per_s == pytest.approx(3.0, rel=0.5)
    assert steady.predicted_per_s == pytest.approx(3.0, rel=0.5)


def test_corrections_of_the_engine_reach_the_scores():
    world = World(controller(), factors={2: 4.0})
    world.run(20.0, 3.0, urgent=True)
    decided = [event for event in world.events if isinstance(event, PlanDecided)][-1]
    assert decided.correction == {2: 4.0}
    score = next(score for score in decided.scores if score.plan == "TP2")
    assert score.value == 0.0, "steps four times as long miss a target of 12 ms"


def test_decisions_read_as_sentences():
    world = World(controller())
    flipping(world, 2)
    told_all = list(told(world.events))
    assert any("went to 2xTP1" in line for line in told_all)
    assert any("switch to 2xTP1 done" in line for line in told_all)
    assert "1 changes of plan" in summary(world.events)
    first = next(event for event in world.events if isinstance(event, PlanDecided))
    assert "stayed in TP2" in words(first)
    assert "priority" in words(first)


def test_a_run_without_a_controller_says_so():
    assert "controller was off" in summary([])


def test_fixed_costs_leave_nothing_to_choose():
    """Plans that are all alike: whoever is in force stays."""
    steps = StepTimes(FixedCost(), [1, 2])
    scorer = Scorer(steps, Limits(64, 512, lambda degree: 1e6))
    world = World(Controller(PLANS, TierSet(), scorer, FixedCost()), PLANS.plans[1])
    flipping(world)
    assert world.moves == []
