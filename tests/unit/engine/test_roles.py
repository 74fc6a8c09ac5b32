"""Prefill lanes compute prompts and first tokens, other lanes the rest."""

from nitsum.events import Finished, HandedOver, Routed, StepSent
from nitsum.plan import PlanSet, parse_plan
from tests.unit.engine.machine import Machine

SPLIT = "TP2-prefill+2xTP1-decode"
PROMPT = [1, 2, 3, 0] * 6


def machine_of(*names: str, **options: object) -> Machine:
    plans = tuple(parse_plan(name, 4) for name in names)
    return Machine(4, plans=PlanSet(4, plans, names[0]), **options)  # type: ignore[arg-type]


def steps_on(machine: Machine, degree: int) -> list[StepSent]:
    return [e for e in machine.log.events if isinstance(e, StepSent) and e.group.degree == degree]


def handed_over(machine: Machine) -> list[HandedOver]:
    return [event for event in machine.log.events if isinstance(event, HandedOver)]


def test_a_request_is_computed_in_one_lane_and_answered_in_another():
    machine = machine_of(SPLIT, num_blocks=40)
    for seed in range(6):
        machine.submit([seed, *PROMPT], 8)
    machine.drain()
    assert len(handed_over(machine)) == 6
    assert {event.from_group.degree for event in handed_over(machine)} == {2}
    assert {event.to_group.index for event in handed_over(machine)} == {2, 3}
    assert all(step.num_decode == 0 for step in steps_on(machine, 2))
    assert all(step.prefill_tokens == 0 for step in steps_on(machine, 1))
    ends = [event for event in machine.log.events if isinstance(event, Finished)]
    assert {event.group.degree for event in ends if event.group} == {1}


def test_final_blocks_go_ahead_of_the_last_chunk():
    machine = machine_of(SPLIT, num_blocks=40, max_batch_tokens=8)
    machine.submit(PROMPT * 2, 4)
    sequence = next(iter(machine.core.sequences.values()))
    while sequence not in machine.core.generation.hand_overs.open:
        machine.turn()
    assert sequence.num_remaining > 1, "it is on its way while its prompt is being computed"
    machine.drain()
    (event,) = handed_over(machine)
    assert event.held_s < event.duration_s


def test_an_answer_of_one_token_stays():
    machine = machine_of(SPLIT, num_blocks=40)
    machine.submit(PROMPT, 1)
    machine.drain()
    assert not handed_over(machine)


def test_without_a_place_it_decodes_where_it_is():
    machine = machine_of("2xTP1-prefill+2xTP1-decode", num_blocks=60, max_num_seqs=1)
    for seed in range(4):
        machine.submit([seed, 1], 30)
    machine.drain()
    decodes = [e.group.index for e in machine.log.events if isinstance(e, StepSent)]
    assert set(decodes) == {0, 1, 2, 3}
    prefill = [e for e in machine.log.events if isinstance(e, StepSent) and e.group.index < 2]
    assert sum(step.num_decode for step in prefill) > 10


def test_a_lane_never_gets_more_than_it_steps_at_once():
    machine = machine_of("2xTP1-prefill+2xTP1-decode", num_blocks=60, max_num_seqs=2)
    for seed in range(8):
        machine.submit([seed, 1], 30)
    while machine.core.has_work:
        machine.turn()
        for loop in machine.core.generation.loops.values():
            assert loop.scheduler.num_running <= 2
    machine.drain()


def test_prompts_of_a_lane_that_becomes_decode_are_routed_anew():
    machine = machine_of("4xTP1", "2xTP1-prefill+2xTP1-decode", num_blocks=40, max_num_seqs=1)
    for seed in range(12):
        machine.submit([seed, *PROMPT], 4)
    machine.turn()
    machine.switch("2xTP1-prefill+2xTP1-decode")
    machine.drain()
    assert machine.reports[-1].ok
    routed = [event for event in machine.log.events if isinstance(event, Routed)]
    assert len(routed) > 12
    assert all(event.group.index < 2 for event in routed[12:])


def test_a_plan_may_name_its_decode_lanes_first():
    """Prompts that wait in a lane which becomes decode go to lanes that open after it."""
    machine = machine_of("2xTP2", "TP2-decode+2xTP1-prefill", num_blocks=40, max_num_seqs=1)
    for seed in range(8):
        machine.submit([seed, *PROMPT], 4)
    machine.turn()
    machine.switch("TP2-decode+2xTP1-prefill")
    machine.drain()
    assert machine.reports[-1].ok


def test_answers_of_a_lane_that_becomes_prefill_go_on_elsewhere():
    machine = machine_of("4xTP1", "2xTP1-prefill+2xTP1-decode", num_blocks=40)
    for seed in range(8):
        machine.submit([seed, 5], 60)
    for _ in range(10):
        machine.turn()
    machine.switch("2xTP1-prefill+2xTP1-decode")
    machine.drain()
    assert {event.from_group.index for event in handed_over(machine)} == {0, 1}


def test_a_switch_undoes_hand_overs_that_are_not_cut_over():
    machine = machine_of(SPLIT, "TP4", num_blocks=40, max_batch_tokens=8)
    machine.submit(PROMPT * 2, 4)
    while not machine.core.generation.hand_overs.open:
        machine.turn()
    machine.switch("TP4")
    assert not machine.core.generation.hand_overs.open
    machine.drain()
    assert machine.reports[-1].ok
    assert not handed_over(machine)


def test_a_prefix_that_was_handed_over_is_cached_in_both_lanes():
    machine = machine_of(SPLIT, num_blocks=40)
    machine.submit(PROMPT, 3)
    machine.drain()
    machine.submit(PROMPT, 3)
    machine.drain()
    first, second = handed_over(machine)
    assert second.bytes_moved < first.bytes_moved or first.to_group != second.to_group
    ends = [event for event in machine.log.events if isinstance(event, Finished)]
    assert ends[1].num_cached == len(PROMPT) - 4


def test_both_lanes_count_in_admission():
    machine = machine_of("2xTP1-prefill+2xTP1-decode", num_blocks=40)
    machine.submit(PROMPT, 8, "priority")
    admission = machine.core.generation.admission
    lanes = {group.index: promises.num_promised for group, promises in admission.promises.items()}
    assert lanes[0] + lanes[1] == 1
    assert lanes[2] + lanes[3] == 1
    machine.drain()
    assert all(promises.num_promised == 0 for promises in admission.promises.values())
    assert all(admission.book.backlog_s(group, 3) == 0.0 for group in admission.promises)


def test_requests_outlive_a_generation():
    machine = machine_of(SPLIT, num_blocks=40, max_batch_tokens=8)
    for seed in range(4):
        machine.submit([seed, *PROMPT], 8)
    while not machine.core.generation.hand_overs.open:
        machine.turn()
    machine.executor.dying = True
    machine.drain()
    assert len(handed_over(machine)) >= 4
