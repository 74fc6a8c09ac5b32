"""Who comes in, as what, and where to."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.cost.protocol import FixedCost
from nitsum.events import Downgraded, Finished, Refused, Routed
from nitsum.messages import Output
from nitsum.metrics.records import Recorder
from nitsum.sched.promise import LATE, STEPS_UNDER_WAY
from nitsum.tier import BATCH, DEFAULT, DEFAULT_TIERS, FLEX, PRIORITY
from tests.unit.engine.machine import Machine

COST = FixedCost(0.005, 1e-4)


def machine_of(num_ranks: int = 1, **options) -> Machine:
    return Machine(num_ranks, **{"units_per_block": 1, "num_blocks": 400, "cost": COST, **options})


def of(machine: Machine, kind: type) -> list:
    return [event for event in machine.log.events if isinstance(event, kind)]


def outputs(machine: Machine) -> list[Output]:
    """Everything said to clients from here on to the end."""
    said: list[Output] = []
    take = machine._take

    def note(output: Output) -> None:
        said.append(output)
        take(output)

    machine._take = note  # type: ignore[method-assign]
    machine.drain()
    return said


def test_priority_over_capacity_is_served_as_default_and_says_so():
    machine = machine_of(max_num_seqs=4)
    ids = [machine.submit([i] * 8, max_tokens=6, tier="priority") for i in range(9)]
    promised = {e.request_id for e in of(machine, Routed) if e.promised}
    downgraded = {e.request_id for e in of(machine, Downgraded)}
    assert promised == set(ids[:4])
    assert downgraded == set(ids[4:])
    said = outputs(machine)
    for output in said:
        lower = output.request_id in downgraded
        assert output.tier == ("default" if lower else "priority")
        assert output.reason == ("over_capacity" if lower else None)
    assert {e.tier for e in of(machine, Finished) if e.request_id in downgraded} == {"default"}


def test_priority_that_comes_in_a_burst_keeps_its_tier_while_it_is_hardly_late():
    """Some are promised, as many more as fit into four times the target are taken without a
    promise, and only those after them are served as default."""
    machine = machine_of(num_blocks=8000, max_num_seqs=64, max_batch_tokens=512)
    ids = [machine.submit([i, 1] * 100, max_tokens=6, tier="priority") for i in range(60)]
    downgraded = {e.request_id for e in of(machine, Downgraded)}
    promised = {e.request_id for e in of(machine, Routed) if e.promised} - downgraded
    late = set(ids) - promised - downgraded
    assert promised == set(ids[: len(promised)])
    assert downgraded == set(ids[-len(downgraded) :])
    assert late == {e.request_id for e in of(machine, Routed) if e.late}
    assert 0 < len(promised) < len(late)
    most = LATE * (len(promised) + STEPS_UNDER_WAY)  # each takes a planned step
    assert len(promised | late) <= most < len(ids)
    said = outputs(machine)
    assert late == {output.request_id for output in said if output.late}
    requests = Recorder(machine.log.events).requests
    assert max(requests[i].ttft_s for i in promised) <= min(requests[i].ttft_s for i in late)
    assert max(requests[i].ttft_s for i in late) <= LATE * PRIORITY.ttft_s


def test_late_ones_stay_in_the_books_when_workers_start_anew():
    """Else newcomers would be promised the time that the late ones need."""
    machine = machine_of(num_blocks=8000, max_num_seqs=64, max_batch_tokens=512)
    for i in range(60):
        machine.submit([i, 1] * 100, max_tokens=6, tier="priority")
    machine.executor.dying = True
    before = machine.core.generation
    while machine.core.generation is before:
        machine.turn()
    urgent = [s for s in machine.core.sequences.values() if s.tier == "priority"]
    assert any(s.late for s in urgent)
    assert all(s.promised or s.late for s in urgent)
    machine.drain()


def test_late_answers_take_no_more_places_than_keep_everybodys_pace():
    machine = machine_of(cost=FixedCost(0.005, 0.005), max_num_seqs=64, max_batch_tokens=64)
    for i in range(30):
        machine.submit([i] * 8, max_tokens=40, tier="priority")
    downgraded = {e.request_id for e in of(machine, Downgraded)}
    assert len(downgraded) > 20
    machine.drain()
    for record in Recorder(machine.log.events).requests.values():
        if record.request_id not in downgraded:
            assert record.tpot_s <= PRIORITY.tpot_s


def test_flex_over_capacity_is_refused_with_a_time_to_try_again():
    flex = replace(FLEX, deadline_s=2.0)
    machine = machine_of(tiers=(PRIORITY, DEFAULT, flex, BATCH))
    ids = [machine.submit([i] * 30, max_tokens=100, tier="flex") for i in range(40)]
    machine.drain()
    refused = [e.request_id for e in of(machine, Refused)]
    assert 0 < len(refused) < 40
    assert refused == ids[-len(refused) :]
    for request_id in refused:
        error = machine.errors[request_id]
        assert (error.error_status, error.error_code) == (429, "resource_unavailable")
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 1.0


def test_capacity_comes_back_when_requests_end():
    machine = machine_of(max_num_seqs=2)
    for _ in range(3):
        for i in range(2):
            machine.submit([i] * 8, max_tokens=3, tier="priority")
        machine.run()
    assert of(machine, Downgraded) == []


def test_a_machine_too_slow_for_a_tier_serves_it_as_best_effort():
    """Nothing would be gained by downgrading all of it: order is what is left."""
    machine = machine_of(cost=FixedCost(1.0, 0.0))
    urgent = machine.submit([1] * 8, max_tokens=3, tier="priority")
    assert of(machine, Downgraded) == []
    routed = of(machine, Routed)
    assert [(e.request_id, e.promised) for e in routed] == [(urgent, False)]
    machine.drain()


def test_queues_are_bounded_by_requests_and_by_tokens():
    tiers = (replace(DEFAULT, max_queue_requests=3, max_queue_tokens=50),)
    machine = machine_of(tiers=tiers)
    for i in range(4):
        machine.submit([i] * 4, max_tokens=2)
    assert [e.code for e in of(machine, Refused)] == ["rate_limit_exceeded"]
    machine.drain()
    machine.submit([1] * 40, max_tokens=2)
    machine.submit([1] * 11, max_tokens=2)
    assert len(of(machine, Refused)) == 2
    machine.drain()


def test_preempted_work_does_not_count_against_the_queue():
    tiers = (PRIORITY, DEFAULT, replace(FLEX, max_queue_requests=1))
    machine = machine_of(tiers=tiers, max_num_seqs=2)
    for _ in range(2):
        machine.submit([1] * 5, max_tokens=30, tier="flex")
        while machine.core.status("x").num_waiting:
            machine.turn()
    for i in range(2):
        machine.submit([7 + i] * 5, max_tokens=30, tier="priority")
    while machine.core.status("x").lanes[0].num_paused < 2:
        machine.turn()
    machine.submit([2] * 5, max_tokens=3, tier="flex")
    assert of(machine, Refused) == []
    machine.drain()


def test_who_waits_too_long_for_a_first_step_hears_of_it():
    tiers = tuple(replace(tier, over_capacity="queue") for tier in (PRIORITY, DEFAULT, FLEX))
    tiers = (*tiers[:2], replace(tiers[2], queue_timeout_s=0.2))
    machine = machine_of(tiers=tiers, max_num_seqs=2)
    for _ in range(2):
        machine.submit([1] * 5, max_tokens=700, tier="priority")
    while machine.core.status("x").num_running < 2:
        machine.turn()
    flex = machine.submit([2] * 5, max_tokens=3, tier="flex")
    machine.drain()
    assert machine.errors[flex].error_code == "queue_timeout"
    assert machine.errors[flex].error_status == 429
    assert [(e.request_id, e.tier, e.code) for e in of(machine, Refused)] == [
        (flex, "flex", "queue_timeout")
    ]
    assert flex not in {e.request_id for e in of(machine, Finished)}


def test_load_spreads_and_prefixes_decide_between_equals():
    machine = machine_of(2, plans=None)
    machine.switch("2xTP1")
    machine.run()
    first = machine.submit([3] * 33, max_tokens=2)
    second = machine.submit([4] * 33, max_tokens=2)
    lanes = {e.request_id: e.group for e in of(machine, Routed)}
    assert lanes[first] != lanes[second]
    machine.run()
    for prompt, earlier in (([4] * 33, second), ([3] * 33, first)):
        again = machine.submit(prompt, max_tokens=2)
        lanes = {e.request_id: e.group for e in of(machine, Routed)}
        assert lanes[again] == lanes[earlier]
        machine.run()


@settings(max_examples=40)
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "turn", "switch", "die", "abort"]),
            st.sampled_from([tier.name for tier in DEFAULT_TIERS]),
            st.integers(1, 30),
            st.integers(1, 12),
        ),
        max_size=40,
    ),
    seed=st.integers(0, 99),
)
def test_books_are_empty_when_nothing_is_left(script, seed):
    """Load, promises, queues and fairness counts are sums kept by hand: they must end at zero."""
    machine = Machine(2, seed=seed, units_per_block=2, num_blocks=16, num_host_blocks=8, cost=COST)
    names = [plan.name for plan in machine.plans.plans]
    for action, tier, num_prompt, number in script:
        if action == "submit":
            machine.submit([number] * num_prompt, number, tier)
        elif action == "turn":
            for _ in range(number):
                machine.turn()
        elif action == "switch":
            machine.switch(names[number % len(names)])
        elif action == "abort" and machine.core.sequences:
            machine.abort(list(machine.core.sequences)[number % len(machine.core.sequences)])
        elif action == "die":
            machine.executor.dying = True
    machine.drain()
    admission = machine.core.generation.admission
    for promises in admission.promises.values():
        assert (promises.num_promised, promises.num_tokens) == (0, 0)
    for group in machine.plans.groups:
        assert admission.book.num_tokens(group) == 0
        assert admission.book.backlog_s(group, len(DEFAULT_TIERS) - 1) == 0.0
    for accounts in machine.core.memory.accounts.values():
        assert (accounts.num_waiting, accounts.num_waiting_tokens) == (0, 0)
    assert len(machine.core.timeouts) == 0
