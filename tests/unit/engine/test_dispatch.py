"""What is sent, and in what order, when room is made by moving pages."""

from nitsum.control.courier import Courier
from nitsum.control.migration import Wave
from nitsum.kv.blocks import Relocation
from nitsum.messages import Move
from nitsum.plan import Group
from tests.unit.engine.machine import Machine


def sent_to(machine: Machine, rank: int) -> list[Move]:
    inbox = machine.executor.ranks[rank].inbox
    return [message for message in inbox if isinstance(message, Move)]


def relocate(machine: Machine, *copies: Relocation) -> None:
    machine.core.generation.kv._copies.extend(copies)


def test_relocations_leave_before_anything_that_counts_messages():
    machine = Machine(2, units_per_block=2)
    dispatcher = machine.core.generation.dispatcher
    relocate(machine, Relocation(1, 4, 8, 2))
    assert dispatcher.num_sent(1) == 1
    assert dispatcher.num_settled(1) == 1
    assert dispatcher.num_settled(0) == 0
    assert sent_to(machine, 1)[0].pulls[0].dst_units == [8, 9]


def test_copies_that_build_on_each_other_are_separate_messages():
    """A place that was freed and taken again must be read before it is written."""
    machine = Machine(2, units_per_block=2)
    relocate(machine, Relocation(0, 4, 8, 2), Relocation(0, 6, 4, 2), Relocation(0, 12, 14, 2))
    machine.core.generation.dispatcher.flush_copies()
    assert [move.pulls[0].src_units for move in sent_to(machine, 0)] == [[4, 5], [6, 7, 12, 13]]


def test_a_pull_waits_for_relocations_of_its_source():
    machine = Machine(2, units_per_block=2)
    request = machine.submit([1] * 9, max_tokens=4)
    sequence = machine.core.sequences[request]
    while sequence.num_computed < 9:
        machine.turn()
    generation = machine.core.generation
    src = sequence.group
    assert src is not None
    relocate(machine, Relocation(src.index, 40, 44, 2))
    generation.open_lane(machine.plans["TP2"].lanes[0])
    wave = Wave(generation, Courier(generation.dispatcher, units_under_way=99))
    move = wave.add(sequence, Group(2, 0))
    assert move is not None
    assert wave.fill(move, 99) == 3
    wave.flush()
    pulls = sent_to(machine, 1 - src.index)
    assert pulls[-1].after == [(src.index, generation.dispatcher.num_settled(src.index))]
