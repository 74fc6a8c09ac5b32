"""Which differences between two texts are excused, and by what."""

import struct

import pytest

from nitsum.bench.driver import Answer
from nitsum.bench.switch import Result, compare_text
from nitsum.bench.texts import best_two_gap, first_difference
from nitsum.metrics.percentiles import Summary
from nitsum.request import Request, SamplingParams

CLEAR, CLOSE = struct.pack("3f", 1.0, 3.0, 2.0), struct.pack("3f", 1.0, 2.0001, 2.0)


def answer(tokens: list[int], logits: list[bytes] | None = None) -> Answer:
    return Answer(Request("s0", [1], SamplingParams()), tokens, logits or [])


def compared(ours: list[int], reference: list[int], logits: list[bytes]) -> Result:
    result = Result([], [], Summary(0), [], 0, 1, 0, 0)
    compare_text(result, [answer(ours)], [answer(reference, logits)])
    return result


def test_where_texts_part():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_the_gap_between_the_two_best():
    assert best_two_gap(CLEAR) == pytest.approx(1.0)
    assert best_two_gap(CLOSE) == pytest.approx(1e-4, rel=0.1)


def test_equal_texts_are_the_same():
    assert compared([1, 2], [1, 2], [CLEAR, CLEAR]).num_same == 1


def test_a_close_call_is_excused_and_nothing_else_is():
    assert compared([1, 2], [1, 0], [CLEAR, CLOSE]).num_close == 1
    assert compared([1, 2], [1, 0], [CLOSE, CLEAR]).different == ["s0 from token 1 on"]


def test_a_text_that_is_too_long_or_too_short_is_different():
    assert compared([1, 2, 2], [1, 2], [CLOSE, CLOSE]).different
    assert compared([1], [1, 2], [CLEAR, CLEAR]).different
