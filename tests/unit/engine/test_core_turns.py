"""How lanes on the same ranks take turns, in a switch and out of it."""

from nitsum.events import StepSent, SwitchEnded
from nitsum.sched.prefills import MIN_CHUNK
from nitsum.tier import Tier
from tests.unit.engine.machine import Machine


def test_lanes_that_take_turns_in_a_switch_keep_their_chunks_small():
    machine = Machine(
        2, units_per_block=2, num_blocks=44, max_num_seqs=8, max_batch_tokens=64, policy="fcfs"
    )
    requests = [machine.submit([i] * 13, max_tokens=30) for i in range(8)]
    while any(machine.core.sequences[request].num_computed < 13 for request in requests):
        machine.turn()
    machine.switch("TP2")
    while not any(loop.draining for loop in machine.core.generation.loops.values()):
        machine.turn()
    start = len(machine.log.events)
    for _ in range(4):
        machine.submit([5] * 40, max_tokens=2)
    machine.drain()
    machine.submit([6] * 40, max_tokens=2)
    machine.drain()
    events = machine.log.events
    end = next(i for i, e in enumerate(events) if isinstance(e, SwitchEnded))
    steps = [e for e in events[start:end] if isinstance(e, StepSent)]
    both = steps[: max(i for i, step in enumerate(steps) if step.group.degree == 1)]
    within = [step.prefill_tokens for step in both]
    after = [e.prefill_tokens for e in events[end:] if isinstance(e, StepSent)]
    assert 0 < max(within) <= MIN_CHUNK < max(after)


def test_a_distant_deadline_gives_a_lane_no_claim_over_its_neighbours():
    """Narrow lanes with work that waits, due in days, and a wide one that has no targets."""
    tiers = tuple(
        Tier(name, level, deadline_s=1e6, max_wait_s=1e6)
        for level, name in enumerate(("priority", "batch"))
    )
    machine = Machine(2, units_per_block=2, num_blocks=60, tiers=tiers)
    machine.executor.max_messages = 1
    machine.switch("TP2/2xTP1")
    machine.turn()
    for i in range(24):
        machine.submit([i] * 5, max_tokens=20, tier="batch")
    for i in range(2):
        machine.submit([i] * 5, max_tokens=20, tier="priority")
    machine.drain()
    groups = [e.group.degree for e in machine.log.events if isinstance(e, StepSent)]
    first, last = groups.index(2), len(groups) - groups[::-1].index(2)
    among = groups[first:last]
    assert among.count(2) >= 19
    assert len(among) <= 3 * among.count(2)
