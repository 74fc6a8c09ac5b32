"""What a switch is expected to take, after none, some, and short ones."""

from __future__ import annotations

import pytest

from nitsum.control.price import FIRST_FACTOR, Held, SwitchPrice
from nitsum.control.steps import StepTimes
from nitsum.plan import parse_plan
from tests.unit.control.test_controller import Crossing

NARROW, WIDE = parse_plan("2xTP1", 2), parse_plan("TP2", 2)
TOKEN_BYTES = 1000


def held(num_tokens: int) -> list[Held]:
    return [Held(group, 8, num_tokens) for group in WIDE.groups]


def price() -> SwitchPrice:
    return SwitchPrice(Crossing(), StepTimes(Crossing(), [1, 2]), 2)


def switch(learning: SwitchPrice, num_tokens: int, takes_s: float) -> None:
    learning.began(held(num_tokens), NARROW, TOKEN_BYTES)
    learning.ended(takes_s)


def test_switches_that_take_the_same_are_expected_to():
    """The factor is of the prediction alone: it must not shrink what it is measured by."""
    learning = price()
    plain_s = learning.seconds(held(10**6), NARROW, TOKEN_BYTES) / FIRST_FACTOR
    for _ in range(40):
        switch(learning, 10**6, 3.0 * plain_s)
    assert learning.factor == pytest.approx(3.0, rel=1e-3)
    assert learning.seconds(held(10**7), NARROW, TOKEN_BYTES) > 20.0 * plain_s


def test_no_switch_is_expected_to_be_shorter_than_any_so_far():
    """A price that does not depend on what is moved shows as soon as there was one switch."""
    learning = price()
    before_s = learning.seconds(held(10), NARROW, TOKEN_BYTES)
    switch(learning, 10**6, 1.5)
    assert before_s < 1.0
    assert learning.seconds(held(10), NARROW, TOKEN_BYTES) == 1.5
    switch(learning, 10**6, 0.7)
    assert learning.seconds(held(10), NARROW, TOKEN_BYTES) == 0.7


def test_more_to_move_takes_longer_and_what_stays_takes_nothing():
    less, more = (price().seconds(held(n), NARROW, TOKEN_BYTES) for n in (10**5, 10**7))
    assert more > less > price().seconds(held(10**7), WIDE, TOKEN_BYTES)
