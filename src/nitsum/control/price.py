"""What a switch takes: seconds of the machine's time, corrected by what earlier ones took."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from nitsum.control.steps import StepTimes
from nitsum.cost.protocol import CostModel
from nitsum.plan import Group, Plan

FIRST_FACTOR = 5.0
"""Switches take longer than their copies: every message waits for the steps before it. What they
really take replaces this guess."""
LEARNT = 0.3
"""Of the difference, from each switch."""
NUM_REMEMBERED = 8
"""None is expected to take less time than the shortest of so many did."""


class Held(NamedTuple):
    """KV that a lane holds, and by how many sequences."""

    group: Group
    num_sequences: int
    num_tokens: int


class SwitchPrice:
    """Learns from one switch after another."""

    def __init__(self, cost: CostModel, steps: StepTimes, num_ranks: int) -> None:
        self.factor = FIRST_FACTOR
        """Realised over predicted duration."""
        self._cost = cost
        self._steps = steps
        self._num_ranks = num_ranks
        self._under_way_s = 0.0
        self._took_s: deque[float] = deque(maxlen=NUM_REMEMBERED)

    def seconds(self, held: Iterable[Held], target: Plan, token_bytes: int) -> float:
        """Of a switch to `target` that begins now; `token_bytes` of KV, all heads and layers."""
        predicted_s = self._predicted_s(held, target, token_bytes)
        return max(predicted_s * self.factor, min(self._took_s, default=0.0))

    def began(self, held: Iterable[Held], target: Plan, token_bytes: int) -> None:
        self._under_way_s = self._predicted_s(held, target, token_bytes)

    def ended(self, duration_s: float) -> None:
        self._took_s.append(duration_s)
        if self._under_way_s > 0.0:
            ratio = min(10.0, max(0.1, duration_s / self._under_way_s))
            self.factor += LEARNT * (ratio - self.factor)
            self._under_way_s = 0.0

    def _predicted_s(self, held: Iterable[Held], target: Plan, token_bytes: int) -> float:
        """What is moved is copied once, all ranks at work; every wave holds its requests for a few
        steps, and until the last wave old and new lanes take turns."""
        staying = set(target.groups)
        moving = [each for each in held if each.group not in staying]
        num_bytes = sum(each.num_tokens for each in moving) * token_bytes
        copy_s = self._cost.move_time(num_bytes // self._num_ranks) if num_bytes else 0.0
        steps = self._steps
        step_s = max(steps.seconds(d, 8.0, 8192.0, 0.0, 0.0) for d in steps.degrees)
        num_waves = max((-(-each.num_sequences // 32) for each in moving), default=0)
        return copy_s + 3 * num_waves * step_s
