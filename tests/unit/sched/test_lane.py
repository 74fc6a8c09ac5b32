"""What clients of different tiers see: displacement, kept KV, shares, bounds; by events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.cost.protocol import FixedCost
from nitsum.events import (
    Displaced,
    Finished,
    Preempted,
    Promoted,
    Resumed,
    Started,
    StepEnded,
    StepSent,
)
from nitsum.plan import Group, read_plans
from nitsum.tier import BATCH, DEFAULT, DEFAULT_TIERS, FLEX, PRIORITY
from tests.unit.engine.machine import Machine

LEVELS = {tier.name: tier.level for tier in DEFAULT_TIERS}
FAST = FixedCost(0.001, 1e-6)


def one_rank(**options) -> Machine:
    return Machine(1, **{"units_per_block": 1, "num_blocks": 64, "cost": FAST, **options})


def of(machine: Machine, kind: type) -> list:
    return [event for event in machine.log.events if isinstance(event, kind)]


def fill_slots(machine: Machine, tier: str = "flex", num_prompt: int = 5) -> list[str]:
    ids = [machine.submit([i] * num_prompt, max_tokens=20, tier=tier) for i in range(4)]
    while machine.core.status("x").num_running < 4:
        machine.turn()
    return ids


def test_a_priority_request_starts_in_the_first_step_composed_after_it_arrives():
    machine = one_rank()
    flex = fill_slots(machine)
    for _ in range(7):
        machine.turn()
    sent_before = of(machine, StepSent)[-1].step_id
    urgent = machine.submit([9] * 5, max_tokens=3, tier="priority")
    machine.drain()
    first_after = next(e.step_id for e in of(machine, StepSent) if e.step_id > sent_before)
    started = next(e for e in of(machine, Started) if e.request_id == urgent)
    displaced = of(machine, Displaced)
    assert started.step_id == first_after
    assert [(e.by_request_id, e.step_id) for e in displaced] == [(urgent, first_after)]
    assert displaced[0].request_id in flex
    assert [e.num_recomputed for e in of(machine, Resumed)] == [0]
    assert machine.ended[displaced[0].request_id] == "length"


def test_in_a_full_arena_displaced_kv_goes_to_host_memory_and_comes_back():
    machine = one_rank(num_blocks=25, num_host_blocks=64)
    fill_slots(machine, num_prompt=12)
    for i in range(6):
        machine.submit([20 + i] * 12, max_tokens=12, tier="priority")
    machine.drain()
    preempted = of(machine, Preempted)
    assert preempted
    assert all(event.kept for event in preempted)
    assert of(machine, Resumed)
    assert all(event.num_recomputed == 0 for event in of(machine, Resumed))


def test_without_host_memory_it_is_computed_again_and_says_so():
    machine = one_rank(num_blocks=25)
    fill_slots(machine, num_prompt=12)
    for i in range(6):
        machine.submit([20 + i] * 12, max_tokens=12, tier="priority")
    machine.drain()
    preempted = of(machine, Preempted)
    assert preempted
    assert not any(event.kept for event in preempted)
    assert sum(event.num_recomputed for event in of(machine, Resumed)) > 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_baselines_never_displace(policy):
    machine = one_rank(policy=policy)
    flex = fill_slots(machine)
    waiting = [machine.submit([8] * 5, max_tokens=3, tier="flex") for _ in range(2)]
    urgent = machine.submit([9] * 5, max_tokens=3, tier="priority")
    machine.drain()
    assert of(machine, Displaced) == []
    order = [e.request_id for e in of(machine, Started)]
    expected = [*waiting, urgent] if policy == "fcfs" else [urgent, *waiting]
    assert order == flex + expected


def test_fcfs_and_priority_recompute_for_memory():
    machine = one_rank(policy="priority", num_blocks=12, num_host_blocks=64)
    for i in range(4):
        machine.submit([i] * 9, max_tokens=12, tier="default")
    machine.drain()
    assert of(machine, Preempted)
    assert not any(event.kept for event in of(machine, Preempted))


# --- shares and bounds ---------------------------------------------------------------------------


def keep_busy(machine: Machine, num_turns: int, tier: str = "priority") -> None:
    """More of the tier than the lane can serve, all the time."""
    for turn in range(num_turns):
        queued = sum(s.tier == tier for s in machine.core.sequences.values())
        for i in range(12 - queued):
            machine.submit([turn % 7, i] * 3, max_tokens=6, tier=tier)
        machine.turn()


def tokens_by_tier(machine: Machine) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in of(machine, StepEnded):
        for request_id, count in event.tokens:
            tier = machine.requests[request_id].tier
            counts[tier] = counts.get(tier, 0) + count
    return counts


def patient(*tiers):
    """Nothing is downgraded or refused: only the lane decides."""
    return tuple(replace(tier, over_capacity="queue") for tier in tiers)


def test_the_lowest_tier_gets_its_share_under_endless_priority_load():
    tiers = patient(PRIORITY, DEFAULT, FLEX, replace(BATCH, min_share=0.2, max_wait_s=1e6))
    machine = one_rank(tiers=tiers)
    for i in range(100):
        machine.submit([i] * 6, max_tokens=30, tier="batch")
    keep_busy(machine, 1500)
    counts = tokens_by_tier(machine)
    assert counts["batch"] > 0.15 * (counts["batch"] + counts["priority"])
    assert counts["batch"] < 0.35 * (counts["batch"] + counts["priority"])


def test_without_a_share_it_gets_nothing_until_its_bound():
    tiers = patient(PRIORITY, DEFAULT, FLEX, replace(BATCH, min_share=0.0, max_wait_s=1e6))
    machine = one_rank(tiers=tiers)
    keep_busy(machine, 50)
    machine.submit([1] * 6, max_tokens=30, tier="batch")
    keep_busy(machine, 1000)
    assert tokens_by_tier(machine).get("batch", 0) == 0


def test_no_request_waits_longer_than_its_bound():
    """Bound of one second; the first step composed after it contains the request."""
    bound_s = 1.0
    tiers = patient(PRIORITY, DEFAULT, replace(FLEX, max_wait_s=bound_s))
    machine = one_rank(tiers=tiers)
    keep_busy(machine, 30)
    flex = {machine.submit([i] * 6, max_tokens=4, tier="flex") for i in range(2)}
    keep_busy(machine, 2500)
    started = [e for e in of(machine, Started) if e.request_id in flex]
    assert len(started) == 2
    for event in started:
        waited_from = machine.requests[event.request_id].arrival_s
        steps_since_due = [
            e for e in of(machine, StepSent) if waited_from + bound_s < e.at_s < event.at_s
        ]
        assert len(steps_since_due) <= 1
    assert {e.request_id for e in of(machine, Promoted)} == flex
    assert flex <= {e.request_id for e in of(machine, Finished)}


def test_a_promoted_request_keeps_its_slot():
    tiers = patient(PRIORITY, DEFAULT, replace(FLEX, max_wait_s=0.2))
    machine = one_rank(tiers=tiers)
    keep_busy(machine, 30)
    flex = machine.submit([1] * 6, max_tokens=40, tier="flex")
    keep_busy(machine, 1500)
    assert flex not in {e.request_id for e in of(machine, Displaced)}
    assert machine.ended[flex] == "length"


# --- budgets -------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_decodes():
    """Chunks shrink to what the decodes' pace bears, and the prompt is through all the same."""
    cost = FixedCost(0.01, 1e-4)
    machine = one_rank(num_blocks=1200, max_batch_tokens=2048, cost=cost)
    for i in range(3):
        machine.submit([i] * 5, max_tokens=60, tier="priority")
    while len(of(machine, StepEnded)) < 5:
        machine.turn()
    machine.submit([5] * 4000, max_tokens=2, tier="flex")
    machine.drain()
    mixed = [e for e in of(machine, StepSent) if e.num_decode and e.prefill_tokens > 20]
    assert mixed
    assert all(e.predicted_s <= 2 * PRIORITY.tpot_s for e in mixed)
    assert max(e.prefill_tokens for e in mixed) > 200


def test_a_guaranteed_share_does_not_keep_a_prompt_from_room_nobody_else_wants():
    """Owed a few tokens a step, it gets them first; alone, it gets all that the decodes bear."""
    machine = one_rank(
        num_blocks=4000, max_batch_tokens=256, cost=FixedCost(0.01, 1e-5), max_num_seqs=64
    )
    for i in range(40):
        machine.submit([i] * 100, max_tokens=100, tier="priority")
    for i in range(4):
        machine.submit([100 + i] * 1000, max_tokens=2, tier="batch")  # earn while those start
    while not (sent := of(machine, StepSent)) or sent[-1].num_decode < 40:
        machine.turn()
    first = len(sent)
    for _ in range(60):
        machine.turn()
    chunks = [event.prefill_tokens for event in of(machine, StepSent)[first:]]
    assert sum(chunks) > 3000
    assert chunks[0] > 50


def test_a_burst_of_long_prompts_gets_its_room_over_several_steps():
    """Finding room for all in one turn would hold everybody up; nobody loses by it."""
    machine = one_rank(num_blocks=4000, max_batch_tokens=64, max_num_seqs=16)
    ids = [machine.submit([i] * 600, max_tokens=2) for i in range(8)]  # 151 blocks each
    tables = machine.core.generation.kv.tables
    machine.turn()
    assert 0 < len(tables) < 8
    machine.drain()
    assert {machine.ended[name] for name in ids} == {"length"}


def test_prompts_that_are_cached_need_no_room_and_start_together():
    machine = one_rank(num_blocks=4000, max_batch_tokens=64, max_num_seqs=16)
    prompt = list(range(600))  # 150 blocks
    machine.submit(prompt, max_tokens=2)
    machine.drain()
    ids = [machine.submit([*prompt, i], max_tokens=2) for i in range(8)]
    machine.turn()
    assert set(ids) <= set(machine.core.generation.kv.tables)
    machine.drain()


def test_fcfs_takes_chunks_as_large_as_a_step():
    machine = one_rank(
        num_blocks=1200, max_batch_tokens=2048, cost=FixedCost(0.01, 1e-4), policy="fcfs"
    )
    machine.submit([1] * 5, max_tokens=60, tier="priority")
    for _ in range(8):
        machine.turn()
    machine.submit([5] * 4000, max_tokens=2, tier="flex")
    machine.drain()
    assert max(e.prefill_tokens for e in of(machine, StepSent)) >= 2047


def test_loose_requests_sit_out_steps_that_tight_ones_need_short():
    """20 ms a token: two fit the priority pace of 50 ms, three its largest gap."""
    machine = one_rank(cost=FixedCost(0.0, 0.02), max_num_seqs=8, tiers=patient(*DEFAULT_TIERS))
    for i in range(5):
        machine.submit([i] * 5, max_tokens=12, tier="flex")
    while machine.core.status("x").num_running < 5:
        machine.turn()
    tight = machine.submit([9] * 5, max_tokens=30, tier="priority")
    machine.drain()
    started = next(e for e in of(machine, Started) if e.request_id == tight)
    ended = next(e for e in of(machine, Finished) if e.request_id == tight)
    beside = [
        e for e in of(machine, StepSent) if started.at_s < e.at_s < ended.at_s and e.num_decode
    ]
    assert min(e.num_decode for e in beside) < 5
    assert all(count == "length" for count in machine.ended.values())


# --- properties ----------------------------------------------------------------------------------

submissions = st.lists(
    st.tuples(
        st.integers(0, 25),  # turns before
        st.sampled_from(list(LEVELS)),
        st.integers(1, 14),  # prompt
        st.integers(1, 16),  # answer
        st.sampled_from(["a", "b"]),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=60)
@given(
    script=submissions,
    seed=st.integers(0, 99),
    num_host_blocks=st.sampled_from([0, 8, 64]),
    is_hopeless=st.booleans(),
)
def test_displacement_goes_down_only_and_everybody_finishes(
    script, seed, num_host_blocks, is_hopeless
):
    """Whether targets can be kept or, in steps of four tokens, never."""
    tiers = patient(*DEFAULT_TIERS)
    if is_hopeless:
        tiers = tuple(replace(t, ttft_s=0.001) if t.ttft_s else t for t in tiers)
    machine = Machine(
        2,
        seed=seed,
        units_per_block=2,
        num_blocks=12,
        num_host_blocks=num_host_blocks,
        cost=FAST,
        tiers=tiers,
        max_batch_tokens=4 if is_hopeless else 16,
    )
    for num_turns, tier, num_prompt, num_answer, _ in script:
        for _ in range(num_turns):
            machine.turn()
        machine.submit([num_prompt] * num_prompt, num_answer, tier)
    machine.drain()
    assert set(machine.ended.values()) <= {"length"}
    check_displacements(machine)
    check_places(machine)


def check_displacements(machine: Machine) -> None:
    """Strictly lower tiers only; nobody takes turns with the one that displaced it."""
    pairs = {(e.request_id, e.by_request_id) for e in of(machine, Displaced)}
    assert not {(by, victim) for victim, by in pairs} & pairs
    for event in of(machine, Displaced):
        assert LEVELS[event.tier] > LEVELS[event.by_tier]


def check_places(machine: Machine) -> None:
    """Preempted work waits for nobody of its tier that arrived later and had not started."""
    returned = {e.request_id for e in of(machine, Resumed)}
    preempted = {e.request_id for e in of(machine, Displaced)}
    preempted |= {e.request_id for e in of(machine, Preempted)}
    assert returned <= preempted
    finished = {e.request_id for e in of(machine, Finished)}
    assert preempted <= finished


@pytest.mark.parametrize("num_prompt", [2, 9])
def test_sequences_of_two_full_lanes_take_turns_in_one(num_prompt: int):
    machine = Machine(
        2, plans=read_plans(["2xTP1", "TP2"], 2), num_blocks=256, cost=FAST, precopy_units=64
    )
    ids = [machine.submit([i] * num_prompt, max_tokens=120) for i in range(8)]
    while machine.core.status("x").num_running < 8:
        machine.turn()
    machine.switch("TP2")
    while not machine.reports:
        machine.turn()
    lengths = [len(machine.answers[name]) for name in ids]
    for _ in range(60):
        machine.turn()
    gained = [len(machine.answers[name]) - n for name, n in zip(ids, lengths, strict=True)]
    assert min(gained) > 0, "somebody never had a turn"
    machine.drain()


def test_a_prompt_that_gives_its_room_back_leaves_the_wave_it_is_part_of():
    plans = read_plans(["2xTP1", "TP2"], 2)
    settings = {"max_batch_tokens": 4, "precopy_units": 64, "cost": FAST}
    machine = Machine(2, plans=plans, num_blocks=256, **settings)
    ids = [machine.submit([i] * 60, max_tokens=20) for i in range(8)]
    while machine.core.status("x").num_running < 8:
        machine.turn()
    machine.switch("TP2")
    switcher, num_lost = machine.core.generation.switcher, 0
    while switcher.current is not None or not machine.reports:
        machine.turn()
        if switcher.current is None or switcher.current.filling is None:
            continue
        moves = [move.sequence for move in switcher.current.filling.wave.moves.values()]
        for sequence in (s for s in moves if s.first_scheduled_s is None):
            sequence.first_due_s = 0.0  # too late for everything
            num_lost += 1
    assert num_lost, "every prompt of the wave was begun"
    machine.drain()
    assert {machine.ended[name] for name in ids} == {"length"}


def test_a_prompt_alone_gets_longer_steps_than_one_beside_decodes():
    machine = one_rank(
        num_blocks=4000, max_batch_tokens=256, max_mixed_tokens=64, max_num_seqs=16, policy="fcfs"
    )
    stream = machine.submit([1] * 4, max_tokens=40)
    while machine.core.sequences[stream].num_output < 2:
        machine.turn()
    machine.submit([2] * 500, max_tokens=1)
    machine.drain()
    machine.submit([3] * 500, max_tokens=1)
    machine.drain()
    steps = [e for e in machine.log.events if isinstance(e, StepSent) and e.prefill_tokens > 4]
    mixed = [e.num_decode + e.prefill_tokens for e in steps if e.num_decode]
    alone = [e.prefill_tokens for e in steps if not e.num_decode]
    assert max(mixed) == 64
    assert max(alone) == 256


def test_few_prompts_beside_decodes_get_short_steps_and_many_full_ones():
    machine = one_rank(num_blocks=4000, max_batch_tokens=64, max_num_seqs=16)
    stream = machine.submit([1] * 4, max_tokens=100, tier="batch")
    while machine.core.sequences[stream].num_output < 2:
        machine.turn()

    def longest_step(num_prompts: int) -> int:
        num_before = len(machine.log.events)
        names = [machine.submit([num_prompts, i] * 50, max_tokens=1) for i in range(num_prompts)]
        while not machine.ended.keys() >= set(names):
            machine.turn()
        steps = [e for e in machine.log.events[num_before:] if isinstance(e, StepSent)]
        assert all(step.num_decode == 1 for step in steps)
        return max(step.num_decode + step.prefill_tokens for step in steps)

    assert longest_step(2) == 32
    assert 32 < longest_step(3) < 64
    assert longest_step(8) == 64


def test_steps_are_full_while_prompts_wait_for_a_slot_and_short_ones_say_nothing_of_the_pace():
    machine = one_rank(num_blocks=4000, max_batch_tokens=64, max_num_seqs=3)
    lane = machine.core.generation.loops[Group(1, 0)].scheduler
    stream = machine.submit([1] * 4, max_tokens=200, tier="batch")
    while machine.core.sequences[stream].num_output < 2:
        machine.turn()
    pace = list(lane.prefill_pace.tokens_per_s)
    two = [machine.submit([9, i] * 50, max_tokens=1) for i in range(2)]
    while not machine.ended.keys() >= set(two):
        machine.turn()
    assert lane.prefill_pace.tokens_per_s == pace, "there was room for more"
    for i in range(12):
        machine.submit([8, i] * 10, max_tokens=1)
    num_before = len(machine.log.events)
    machine.drain()
    steps = [e for e in machine.log.events[num_before:] if isinstance(e, StepSent)]
    assert max(e.num_decode + e.prefill_tokens for e in steps) > 32
