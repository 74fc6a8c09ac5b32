"""The best sequence of plans against all sequences."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest

from nitsum.control.hindsight import best_path


@pytest.mark.parametrize("seed", range(10))
def test_no_sequence_is_better(seed: int):
    draw = random.Random(seed)
    values = [[draw.random() for _ in range(3)] for _ in range(6)]
    prices = [[0.0 if a == b else draw.random() / 2 for b in range(3)] for a in range(3)]

    def worth(plans: tuple[int, ...]) -> float:
        gained = sum(cell[plan] for cell, plan in zip(values, plans, strict=True))
        return gained - sum(prices[a][b] for a, b in pairwise(plans))

    path = best_path(values, prices)
    assert path.value == pytest.approx(max(map(worth, product(range(3), repeat=6))))
    assert path.value == pytest.approx(worth(tuple(path.plans)))


def test_a_dear_switch_is_not_worth_a_short_gain():
    values = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert best_path(values, [[0.0, 0.1], [0.1, 0.0]]).plans == [0, 1, 0]
    assert best_path(values, [[0.0, 5.0], [5.0, 0.0]]).plans == [0, 0, 0]
