"""When ranks want their next steps: alarms are for steps that could be sent then."""

from __future__ import annotations

from math import inf

from nitsum.bench.deciding import make_core
from nitsum.engine.lanes import LaneLoop, RankLoad, StepInFlight
from nitsum.step import BatchShape

STEP_S = 0.1


def lanes_of(plan: str, num_ranks: int) -> tuple[RankLoad, list[LaneLoop]]:
    generation = make_core(plan, num_ranks).generation
    return generation.rank_load, list(generation.loops.values())


def send(load: RankLoad, *loops: LaneLoop) -> None:
    for step_id, loop in enumerate(loops):
        load.sent(StepInFlight(loop, step_id, (), set(), 0.0, BatchShape(), STEP_S))


def test_a_rank_that_only_a_wide_overlaid_lane_uses_raises_no_alarm():
    """Rank 0 is full, so the wide lane cannot go on, whatever ranks 1 to 3 have before them."""
    load, loops = lanes_of("TP4/TP1", 4)
    wide, narrow = sorted(loops, key=lambda loop: -loop.group.degree)
    send(load, narrow, wide)
    assert not load.free_for(wide)
    assert load.next_send_s(0.0) == inf
    assert not load.is_due(0.0)
    assert not load.is_due(3 * STEP_S)


def test_lanes_that_share_ranks_are_sent_at_once_what_has_room():
    load, loops = lanes_of("TP4/TP1", 4)
    wide, narrow = sorted(loops, key=lambda loop: -loop.group.degree)
    assert load.is_due(0.0)
    send(load, wide)
    assert load.is_due(0.0)
    assert set(map(id, load.due(loops, 0.0))) == {id(wide), id(narrow)}


def test_a_lane_of_its_own_gets_its_next_step_shortly_before_the_last_one_ends():
    load, (loop,) = lanes_of("TP4", 4)
    send(load, loop)
    assert not load.is_due(0.0)
    assert load.next_send_s(0.0) == STEP_S - load.send_ahead_s
