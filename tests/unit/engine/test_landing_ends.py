"""Lanes about to be emptied come to an end, whatever their steps take and was predicted of them."""

from __future__ import annotations

from random import Random

import pytest

from nitsum.bench.deciding import make_core
from nitsum.engine.landing import MAX_STEPS
from nitsum.engine.lanes import LaneLoop, StepInFlight
from nitsum.step import BatchShape

SHORTEST_S = 0.002
LONGEST_S = 0.12
AIM_AT_S = 0.3


class Lanes:
    """Busy lanes whose steps last what nobody predicted."""

    def __init__(self, plan: str, num_ranks: int, seed: int) -> None:
        generation = make_core(plan, num_ranks).generation
        self.random = Random(seed)
        self.loops = list(generation.loops.values())
        self.landing, self.load = generation.landing, generation.rank_load
        self.now = 0.0
        self.num_sent = 0
        self.under_way: list[tuple[float, int, StepInFlight]] = []
        self.longest_s = {loop.group: self.random.choice([0.004, 0.02]) for loop in self.loops}
        self.factor = {loop.group: self.random.choice([0.2, 1.0, 4.0]) for loop in self.loops}
        for loop in self.loops:
            loop.scheduler.decode_s = self.random.choice([0.0, 0.003, 0.01])

    def send(self, loop: LaneLoop, predicted_s: float, takes_s: float | None = None) -> None:
        self.num_sent += 1
        step = StepInFlight(loop, self.num_sent, (), set(), self.now, BatchShape(), predicted_s)
        self.load.sent(step)
        loop.num_in_flight += 1
        ranks = set(loop.group.ranks)
        before = [end for end, _, other in self.under_way if ranks & {*other.loop.group.ranks}]
        end_s = max([self.now, *before]) + (predicted_s if takes_s is None else takes_s)
        self.under_way.append((end_s, self.num_sent, step))

    def collect(self) -> None:
        """What ended is known; time stands at the next moment when something happens."""
        for entry in [entry for entry in self.under_way if entry[0] <= self.now]:
            self.under_way.remove(entry)
            entry[2].loop.num_in_flight -= 1
            self.load.ended(entry[2], self.now)

    def dispatch(self) -> None:
        self.load.held.clear()
        due = self.load.due(self.loops, self.now)
        for loop in self.random.sample(self.loops, len(self.loops)):
            if not self.load.free_for(loop) or loop not in due:
                continue
            if self.landing.lets_send(loop, self.now):
                self.send(loop, *self.lasts_s(loop))
                self.landing.note_sent(loop)

    def lasts_s(self, loop: LaneLoop) -> tuple[float, float]:
        """Predicted, and real."""
        least_s = max(SHORTEST_S, loop.scheduler.decode_s)
        predicted_s = least_s + self.random.random() * self.longest_s[loop.group]
        start_s = self.load.start_s(loop, self.now)
        predicted_s = max(least_s, min(predicted_s, loop.scheduler.end_by_s - start_s))
        return predicted_s, predicted_s * self.factor[loop.group]

    def wait(self) -> None:
        at_s = [end for end, _, _ in self.under_way]
        at_s.append(self.load.next_send_s(self.now))
        self.now = min((s for s in at_s if s > self.now), default=self.now)


@pytest.mark.parametrize("plan", ["2xTP1", "8xTP1", "TP4+4xTP1", "TP2/2xTP1"])
@pytest.mark.parametrize("seed", range(15))
def test_lanes_are_never_held_for_long(plan: str, seed: int):
    lanes = Lanes(plan, 2 if "2x" in plan else 8, seed)
    while lanes.now < AIM_AT_S:
        lanes.collect()
        lanes.dispatch()
        lanes.wait()
    lanes.landing.begin([loop.group for loop in lanes.loops])
    lanes.collect()
    while not lanes.landing.aim(lanes.now):
        assert lanes.now - AIM_AT_S < 5 * LONGEST_S
        lanes.dispatch()
        lanes.wait()
        lanes.collect()


def test_a_lane_that_has_no_step_to_send_does_not_count_as_trying():
    """Who waits in it gets no KV any more; that must not make the others give up."""
    lanes = Lanes("4xTP1", 4, 0)
    short, long, idle, _ = lanes.loops
    lanes.send(short, 0.05)
    lanes.send(long, 0.1)
    lanes.landing.begin([loop.group for loop in lanes.loops])
    for _ in range(2 * MAX_STEPS):
        assert not lanes.landing.aim(0.0)
        assert lanes.landing.lets_send(idle, 0.0)
