"""How a switch goes about it: portions, one cut-over, and what may happen in between."""

import pytest

from nitsum.control.courier import Courier
from nitsum.control.following import Following
from nitsum.events import StepSent, WaveCommitted
from nitsum.kv.prefix import hash_prompt
from nitsum.kv.transfer import Transfer
from nitsum.messages import Pull
from nitsum.plan import Group, read_plans
from tests.unit.control.withholding import Withholding
from tests.unit.engine.machine import Machine

WIDE = Group(2, 0)


def busy(seed: int = 0, *, num_requests: int = 6, **settings: object) -> Machine:
    """Two ranks at 2xTP1 with requests in decode."""
    settings = {"max_num_seqs": 16, "max_batch_tokens": 64, "precopy_units": 6, **settings}
    machine = Machine(2, units_per_block=2, num_blocks=200, seed=seed, **settings)  # type: ignore[arg-type]
    machine.switch("2xTP1")
    machine.run()
    for i in range(num_requests):
        machine.submit([i] * (9 + i), max_tokens=90)
    while any(sequence.num_output < 2 for sequence in machine.core.sequences.values()):
        machine.turn()
    return machine


def steps_of(machine: Machine, group: Group, since: int = 0) -> list[StepSent]:
    events = machine.log.events[since:]
    return [event for event in events if isinstance(event, StepSent) and event.group == group]


def turn_until_open(machine: Machine) -> None:
    switch = machine.core.generation.switcher.current
    assert switch is not None
    while not switch.is_open:
        machine.turn()


def test_everybody_cuts_over_together_and_no_lane_takes_turns_before():
    machine = busy()
    since = len(machine.log.events)
    machine.switch("TP2")
    turn_until_open(machine)
    before = [event for event in machine.log.events[since:] if isinstance(event, StepSent)]
    machine.drain()
    waves = [event for event in machine.log.events if isinstance(event, WaveCommitted)]
    assert [len(wave.request_ids) for wave in waves if wave.request_ids] == [6]
    # the turn that opens the new lane cuts over as well; every step before is an old lane's
    assert sum(event.group == WIDE for event in before) <= 2
    assert len(before) > 4


def test_new_work_stays_with_the_old_lanes_until_the_cut_over_and_moves_with_the_others():
    machine = busy()
    machine.switch("TP2")
    machine.turn()
    late = machine.submit([9] * 5, max_tokens=30)
    sequence = machine.core.sequences[late]
    assert sequence.group is not None
    assert sequence.group.degree == 1
    turn_until_open(machine)
    assert sequence.group == WIDE
    machine.drain()


def test_a_turn_reserves_no_more_than_a_portion(monkeypatch: pytest.MonkeyPatch):
    machine = busy(precopy_units=64)
    machine.core.generation.switcher.fill_blocks = 4
    taken: list[int] = []
    reserve = Transfer.reserve

    def counting(self: Transfer, sources, *, compacts=True):
        count = reserve(self, sources, compacts=compacts)
        taken.append(count)
        return count

    monkeypatch.setattr(Transfer, "reserve", counting)
    machine.switch("TP2")
    portions: list[int] = []
    switch = machine.core.generation.switcher.current
    assert switch is not None
    while not switch.is_open:
        taken.clear()
        machine.turn()
        portions.append(sum(taken))
    assert max(portions[:-1]) == 4
    assert sum(portion > 0 for portion in portions) >= 5
    machine.drain()


@pytest.mark.parametrize("num_turns", [0, 1, 3, 6, 10, 15, 21])
@pytest.mark.parametrize("what", ["abort", "cancel", "die"])
def test_whatever_happens_in_whichever_phase(num_turns: int, what: str):
    """Accounting is checked after every turn, every answer at the end."""
    machine = busy(seed=num_turns)
    machine.switch("TP2")
    for _ in range(num_turns):
        machine.turn()
    if what == "abort":
        for request_id in list(machine.core.sequences)[::2]:
            machine.abort(request_id)
    elif what == "cancel":
        machine.core.generation.switcher.cancel_wave("the test says so")
    else:
        machine.executor.dying = True
    machine.submit([8] * 6, max_tokens=4)
    machine.drain()
    assert machine.core.status("x").plan == "TP2"
    assert machine.reports[-1].ok


def test_a_wave_called_off_before_anything_opened_closes_no_lane():
    machine = busy(num_requests=1)  # one of the two lanes has nothing to move
    machine.switch("TP2")
    machine.turn()
    machine.core.generation.switcher.cancel_wave("a test")
    for _ in range(3):
        machine.turn()
        assert set(machine.core.generation.switcher.plan.groups) <= set(
            machine.core.generation.loops
        )
    machine.drain()


def test_dropping_a_request_before_the_cut_over_gives_its_room_back():
    machine = busy(num_requests=2)
    kv = machine.core.generation.kv
    machine.switch("TP2")
    machine.turn()
    assert kv.holders
    machine.core.generation.switcher.cancel_wave("the test says so")
    held = [h for holder in kv.holders for h in holder.held()]
    assert all(h.block.group.degree == 1 for h in held)  # only sources, until copies have ended
    machine.drain()
    assert not kv.holders


def test_there_and_back_stays_in_place():
    """Pages that were cut in half grow around what was left of them."""
    machine = busy()
    for plan in ("TP2", "2xTP1"):
        machine.switch(plan)
        while machine.core.generation.switcher.current is not None:
            machine.turn()
    wave = machine.reports[-1].waves[0]
    assert wave.num_requests == 6
    assert wave.units_in_place > 0
    machine.drain()


def full_of_prefixes(prompts: list[list[int]], **settings: object) -> Machine:
    """One lane that nobody uses, and what it cached."""
    settings = {"max_num_seqs": 16, "max_batch_tokens": 64, **settings}
    machine = Machine(2, units_per_block=2, num_blocks=200, **settings)  # type: ignore[arg-type]
    machine.switch("TP2")
    machine.drain()
    for prompt in prompts:
        machine.submit(prompt, max_tokens=2)
    machine.drain()
    return machine


@pytest.mark.parametrize("precopy_units", [0, 24, 6])
def test_cached_prefixes_are_shared_out_among_lanes_each_of_them_whole(precopy_units: int):
    """However little may be under way at once, which has room at one moment and not at another."""
    prompts = [[i] * 20 for i in range(12)]
    machine = full_of_prefixes(prompts, precopy_units=precopy_units)
    machine.switch("2xTP1")
    machine.drain()
    prefixes = machine.core.generation.kv.prefixes
    found = [
        [len(prefixes.in_layout(Group(1, rank)).keys() & hash_prompt(p, 4)) for rank in range(2)]
        for p in prompts
    ]
    assert all(min(counts) == 0 for counts in found)
    assert {counts.index(max(counts)) for counts in found if any(counts)} == {0, 1}
    assert sum(map(max, found)) == 60, "none had to make way for another"


def test_cached_prefixes_are_sent_in_portions_not_a_few_blocks_at_a_time():
    """A rank that has all it may have before it is sent more when an eighth of that has arrived."""
    machine = full_of_prefixes([[i] * 80 for i in range(8)])
    mover = Withholding()
    courier = Courier(mover, 64)
    for i in range(32):
        courier.send(i % 2, [Pull(i % 2, [0] * 4, [0] * 4)], [], [])
    plan = read_plans(["2xTP1"], 2)["2xTP1"]
    following = Following(machine.core.generation, courier, number=1, sources=[WIDE], plan=plan)
    for move_id in range(1, 33):
        courier.acknowledge(move_id, 0)
        following.advance(32)
    portions = [[num for at, num in mover.sent[32:] if at == rank] for rank in (0, 1)]
    for sent in portions:
        assert sum(sent) >= 56
        assert min(sent) >= 8


def test_newcomers_wait_for_sources_to_go_not_for_cached_prefixes_to_follow(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("nitsum.control.switching.RELEASE_BLOCKS", 2)
    machine = busy()
    for i in range(12):
        machine.submit([100 + i] * 20, max_tokens=2)
    for _ in range(40):
        machine.turn()
    machine.switch("TP2")
    generation = machine.core.generation
    was_settling = followed = False
    while (switch := generation.switcher.current) is not None:
        settling = any(loop.scheduler.is_settling for loop in generation.loops.values())
        was_settling |= settling
        if switch.following is not None and not switch.following.is_over:
            followed = True
            assert not settling
        machine.turn()
    assert was_settling
    assert followed
    assert not any(loop.scheduler.is_settling for loop in generation.loops.values())
    machine.drain()


def test_lanes_of_both_plans_go_on_admitting():
    plans = read_plans(["TP2+2xTP1", "2xTP2"], 4)
    machine = Machine(4, num_blocks=200, plans=plans, max_num_seqs=16, max_batch_tokens=64)
    for i in range(9):
        machine.submit([i] * (9 + i), max_tokens=90)
    while any(sequence.num_output < 2 for sequence in machine.core.sequences.values()):
        machine.turn()
    machine.switch("2xTP2")
    loops = machine.core.generation.loops
    settled: set[Group] = set()
    while machine.core.generation.switcher.current is not None:
        settled |= {group for group, loop in loops.items() if loop.scheduler.is_settling}
        machine.turn()
    assert Group(2, 1) in settled
    assert Group(2, 0) not in settled
    machine.drain()


def test_no_cached_prefix_follows_to_a_lane_that_takes_no_prompts():
    plans = read_plans(["TP2", "TP1-prefill+TP1-decode"], 2)
    machine = Machine(2, num_blocks=200, plans=plans, max_num_seqs=16, max_batch_tokens=64)
    for i in range(12):
        machine.submit([i] * 20, max_tokens=2)
    machine.drain()
    machine.switch("TP1-prefill+TP1-decode")
    machine.drain()
    prefixes = machine.core.generation.kv.prefixes
    assert prefixes.in_layout(Group(1, 0))
    assert not prefixes.in_layout(Group(1, 1))
