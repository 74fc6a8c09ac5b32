"""What is due first, and what is remembered of what was cancelled: nothing."""

from __future__ import annotations

import random
import tracemalloc
import weakref

from nitsum.request import Request, SamplingParams
from nitsum.sched.alarms import Alarms
from nitsum.sequence import Sequence
from tests.unit.sched.kit import make_sequence


class Watched(Sequence):
    """A sequence of which a test can tell whether anybody holds it."""


def taken(alarms: Alarms, now: float) -> list[Sequence]:
    found: list[Sequence] = []
    while (sequence := alarms.due(now)) is not None:
        alarms.cancel(sequence)
        found.append(sequence)
    return found


def test_the_first_to_be_due_comes_first() -> None:
    late, soon, moved, gone = (make_sequence() for _ in range(4))
    alarms = Alarms()
    for sequence, at_s in ((late, 9.0), (soon, 2.0), (moved, 1.0), (gone, 3.0), (moved, 5.0)):
        alarms.set(sequence, at_s)
    alarms.cancel(gone)
    assert len(alarms) == 3
    assert taken(alarms, 1.9) == []
    assert taken(alarms, 6.0) == [soon, moved]
    assert taken(alarms, 9.0) == [late]
    assert len(alarms) == 0


def test_it_stays_due_until_cancelled() -> None:
    alarms, sequence = Alarms(), make_sequence()
    alarms.set(sequence, 1.0)
    assert alarms.due(2.0) is alarms.due(2.0) is sequence


def test_a_cancelled_sequence_is_held_by_nobody() -> None:
    alarms = Alarms()
    sequence = Watched(Request("a", [1] * 8, SamplingParams(max_tokens=4)))
    held = weakref.ref(sequence)
    alarms.set(make_sequence(), 1.0)
    alarms.set(sequence, 1800.0)
    alarms.set(sequence, 1900.0)
    alarms.cancel(sequence)
    del sequence
    assert held() is None


def test_what_is_cancelled_leaves_room() -> None:
    """Ten thousand requests that were served long before their time; a few wait all along."""
    alarms, waiting = Alarms(), [make_sequence() for _ in range(8)]
    for number, sequence in enumerate(waiting):
        alarms.set(sequence, 5000.0 + number)
    tracemalloc.start()
    try:
        for number in range(10_000):
            served = make_sequence()
            alarms.set(served, 1800.0 + number)
            alarms.cancel(served)
        grown_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown_bytes < 100_000
    assert taken(alarms, 9000.0) == waiting


def test_any_order_of_setting_and_cancelling() -> None:
    draw = random.Random(3)
    alarms, expected = Alarms(), dict[Sequence, float]()
    known = [make_sequence() for _ in range(40)]
    for _ in range(3000):
        sequence = draw.choice(known)
        if draw.random() < 0.6:
            expected[sequence] = at_s = draw.random()
            alarms.set(sequence, at_s)
        else:
            expected.pop(sequence, None)
            alarms.cancel(sequence)
    assert len(alarms) == len(expected)
    assert taken(alarms, 1.0) == sorted(expected, key=expected.__getitem__)
