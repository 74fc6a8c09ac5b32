"""The engine on a fake machine: whole lives of requests and switches."""

import pytest

from nitsum.events import Displaced, Resumed, Started, SwitchEnded
from tests.unit.engine.machine import Machine

PLANS = ["4xTP1", "2xTP2", "TP4", "TP2+2xTP1", "TP2/2xTP1+TP2"]


def test_requests_are_answered():
    machine = Machine()
    for i in range(10):
        machine.submit([i, 1, 2, 3, 4, 5, 6, 7, 8][: 3 + i % 6], max_tokens=1 + i)
    machine.drain()


def test_a_prefix_is_computed_once():
    machine = Machine(plans=None)
    prompt = list(range(13))
    machine.submit(prompt, max_tokens=3)
    machine.run()
    second = machine.submit(prompt, max_tokens=3)
    sequence = machine.core.sequences[second]
    machine.drain()
    assert sequence.num_cached == 12


@pytest.mark.parametrize("src", PLANS)
@pytest.mark.parametrize("dst", PLANS)
def test_streams_survive_a_switch(src: str, dst: str):
    machine = Machine(seed=3)
    machine.switch(src)
    machine.run()
    for i in range(8):
        machine.submit([i] * (1 + 3 * i), max_tokens=12)
    for _ in range(12):
        machine.turn()
    machine.switch(dst)
    machine.drain()
    assert all(report.ok for report in machine.reports)
    assert machine.core.status("x").plan == dst


def test_a_switch_works_in_a_nearly_full_arena():
    """95% of the units are in requests' hands; the switch must find its way in waves."""
    machine = Machine(seed=5, num_blocks=20, max_num_seqs=8, max_batch_tokens=64)
    for i in range(16):
        machine.submit([i] * 13, max_tokens=6)
    while machine.core.generation.kv.used_share(0) < 0.8:
        machine.turn()
    for plan in ("TP4", "4xTP1", "2xTP2", "4xTP1"):
        machine.switch(plan)
        while machine.core.generation.switcher.current is not None:
            machine.turn()
    machine.drain()
    ends = [event for event in machine.log.events if isinstance(event, SwitchEnded)]
    assert all(end.ok for end in ends)


def test_urgent_work_displaces_and_displaced_work_completes():
    machine = Machine(num_ranks=1, units_per_block=1, num_blocks=64)
    for i in range(4):
        machine.submit([i] * 5, max_tokens=20, tier="flex")
    for _ in range(10):
        machine.turn()
    urgent = machine.submit([9] * 5, max_tokens=2, tier="priority")
    step_before = max(machine.core.generation.in_flight, default=0)
    machine.drain()
    displaced = [event for event in machine.log.events if isinstance(event, Displaced)]
    assert [event.by_request_id for event in displaced] == [urgent]
    assert step_before < displaced[0].step_id


def test_a_dead_worker_costs_no_token():
    machine = Machine(seed=1)
    for i in range(6):
        machine.submit([i] * 9, max_tokens=10)
    for _ in range(15):
        machine.turn()
    machine.executor.dying = True
    machine.drain()
    assert machine.core.generation_number == 2


def test_too_long_is_refused():
    machine = Machine(num_blocks=4)
    too_long = machine.submit([1] * 100)
    machine.drain()
    assert machine.errors[too_long].error_code == "context_length_exceeded"


def test_switch_to_an_unknown_plan_is_refused():
    machine = Machine()
    machine.switch("TP16")
    machine.turn()
    assert not machine.reports[0].ok
    assert "4xTP1" in machine.reports[0].message


def test_everybody_who_asks_for_a_switch_hears_of_its_end():
    machine = Machine(seed=2)
    for i in range(4):
        machine.submit([i] * 9, max_tokens=8)
    machine.turn()
    machine.core.switch("first", "TP4")
    machine.core.switch("second", "TP4")
    machine.core.switch("first", "TP4")
    machine.drain()
    assert [report.op_id for report in machine.reports] == ["first", "second"]
    assert all(report.ok for report in machine.reports)


def test_asking_again_for_a_switch_that_was_done_changes_nothing():
    machine = Machine(seed=2)
    machine.core.switch("op", "TP4")
    machine.drain()
    machine.core.switch("back", "4xTP1")
    machine.drain()
    machine.core.switch("op", "TP4")
    machine.core.switch("op", "4xTP1")
    machine.drain()
    first, _, again, other = machine.reports
    assert first.ok
    assert again == other == first
    assert machine.core.status("x").plan == "4xTP1"


def test_a_switch_that_was_not_done_can_be_asked_for_again():
    machine = Machine(seed=2)
    for i in range(4):
        machine.submit([i] * 9, max_tokens=8)
    machine.turn()
    machine.core.switch("first", "TP4")
    machine.core.switch("second", "2xTP2")
    machine.drain()
    machine.core.switch("second", "2xTP2")
    machine.drain()
    ended = [(report.op_id, report.ok) for report in machine.reports]
    assert ended == [("second", False), ("first", True), ("second", True)]
    assert machine.core.status("x").plan == "2xTP2"


def test_a_worker_that_dies_in_a_switch_leaves_the_new_plan_in_force():
    machine = Machine(seed=2)
    for i in range(4):
        machine.submit([i] * 9, max_tokens=8)
    for _ in range(5):
        machine.turn()
    machine.core.switch("op", "TP4")
    machine.executor.dying = True
    machine.drain()
    assert machine.reports[0].ok
    assert "killed by the test" in machine.reports[0].message
    assert machine.core.status("x").plan == "TP4"


def test_requests_that_wait_when_a_worker_dies_begin_for_the_first_time_after():
    machine = Machine(num_ranks=1, units_per_block=1, num_blocks=64)
    prompt = [1] * 12
    ran = [machine.submit(prompt, max_tokens=30) for _ in range(4)]
    waited = machine.submit(prompt, max_tokens=4)
    for _ in range(6):
        machine.turn()
    machine.executor.dying = True
    machine.drain()
    resumed = {e.request_id for e in machine.log.events if isinstance(e, Resumed)}
    started = {e.request_id: e for e in machine.log.events if isinstance(e, Started)}
    assert resumed == set(ran)
    assert started[waited].num_cached == 8  # of what others computed, not of its own work


def test_hits_on_its_own_earlier_work_are_no_cached_prompt():
    machine = Machine(num_ranks=1, units_per_block=1, num_blocks=12)
    requests = [machine.submit([i] * 5, max_tokens=24) for i in range(3)]
    sequences = [machine.core.sequences[request] for request in requests]
    machine.drain()
    assert any(sequence.num_restarts for sequence in sequences)
    assert all(sequence.num_cached <= sequence.num_prompt for sequence in sequences)
