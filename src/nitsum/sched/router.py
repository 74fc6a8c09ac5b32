"""Which lane of the plan takes a request."""

from __future__ import annotations

from collections.abc import Callable

from nitsum.kv.cache import KvCache
from nitsum.plan import Group, Lane, Plan
from nitsum.request import Sequence


class Router:
    """Prefers lanes that serve the tier; among them the one that would be done soonest.

    What counts is the positions a lane still has to hold or compute, per rank, with those the
    lane's prefix cache already has taken off.
    """

    def __init__(self, kv: KvCache, load: Callable[[Group], int]) -> None:
        self.kv = kv
        self.load = load

    def choose(self, sequence: Sequence, plan: Plan) -> Lane:
        lanes = [lane for lane in plan.lanes if lane.role != "decode"]
        serving = [lane for lane in lanes if lane.serves(sequence.tier)] or lanes
        return min(serving, key=lambda lane: self._cost(sequence, lane))

    def _cost(self, sequence: Sequence, lane: Lane) -> float:
        hits = self.kv.prefixes.match(lane.group, sequence.hashes)
        new_tokens = len(sequence.tokens) - hits * self.kv.arena.block_tokens
        return (self.load(lane.group) + new_tokens) / lane.degree
