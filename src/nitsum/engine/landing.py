"""Lanes that a switch is about to empty come to their last steps together.

A cut over puts the new lanes' first steps behind the last steps of the old ones. What a stream
feels of it is the time its rank waits for other ranks, and the engine's and the workers' own time
if no step runs meanwhile. So the last steps are made to end together, by the prompts they take on,
and the cut over comes early in them:

    rank 0   | step         | last, made to fit   | new lane ..
    rank 1   | step                    | last     | new lane ..
                            ^ cut over

Meanwhile nobody new gets KV in these lanes: it would have to be left behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from nitsum.engine.lanes import LaneLoop, RankLoad
from nitsum.plan import Group

TOGETHER_S = 3e-3
"""Steps that end so close to each other end together: steps are short meanwhile, and streams used
to longer ones."""
LEAD_S = 0.01
"""The cut over should come so long before the last steps end: it takes the host a few ms."""
MAX_STEPS = 8
"""Steps after which it is given up: ends that no prompts can move together stay where they are. No
lane is sent a step ahead from then on, so the cut over comes when those under way have ended."""


class Landing:
    """From the moment a wave has all it can have until it is cut over; else it does nothing."""

    def __init__(self, lanes: dict[Group, LaneLoop], load: RankLoad) -> None:
        """`lanes`: those of the generation, as they come and go."""
        self._lanes = lanes
        self._load = load
        self._loops: list[LaneLoop] = []
        self._num_sent = 0
        self.is_aiming = False
        """The last steps are on their way."""

    def begin(self, groups: Iterable[Group]) -> None:
        """Nobody new gets KV in these lanes."""
        if self._loops:
            return
        self._loops = [self._lanes[group] for group in groups if group in self._lanes]
        self._num_sent, self.is_aiming = 0, False
        for loop in self._loops:
            loop.scheduler.is_closing = True

    def end(self) -> None:
        """Cut over, or called off."""
        for loop in self._loops:
            loop.scheduler.is_closing = False
            loop.scheduler.end_by_s = inf
        self._loops, self.is_aiming = [], False

    @property
    def is_under_way(self) -> bool:
        return bool(self._loops)

    def aim(self, now: float) -> bool:
        """From now on steps are sent so that the last ones end together; True when they will."""
        self.is_aiming = True
        busy = self._busy()
        if any(loop.num_in_flight > 1 for loop in busy):
            return False
        if not busy or self._num_sent >= MAX_STEPS:
            return True
        return self._end_together(busy) and self._is_early(busy, now)

    def lets_send(self, loop: LaneLoop, now: float) -> bool:
        """Whether the lane may get its next step, and by when that should end."""
        if not self.is_aiming or loop not in self._loops:
            return True
        if self._num_sent >= MAX_STEPS:
            loop.scheduler.end_by_s = inf
            return not loop.num_in_flight
        busy = self._busy()
        mine_s = self._end_s(loop) if loop.num_in_flight else now
        latest_s = max((self._end_s(other) for other in busy), default=now)
        loop.scheduler.end_by_s = inf
        if latest_s - mine_s > TOGETHER_S:
            loop.scheduler.end_by_s = self._meeting_s(loop, mine_s, latest_s, busy)
        elif len(busy) > 1 and (not self._end_together(busy) or self._is_early(busy, now)):
            return False  # others will come to an end with it, or all have, in good time
        return True

    def _meeting_s(
        self, loop: LaneLoop, mine_s: float, latest_s: float, busy: list[LaneLoop]
    ) -> float:
        """When its next step should end: with the last of the others, or if even its decodes take
        longer, where the others' next steps can end without prompts."""
        end_s = mine_s + loop.scheduler.decode_s
        if end_s <= latest_s + TOGETHER_S:
            return latest_s
        next_s = latest_s + max(other.scheduler.decode_s for other in busy if other is not loop)
        return next_s if end_s <= next_s else inf

    def note_sent(self, loop: LaneLoop) -> None:
        """The lane got a step."""
        self._num_sent += self.is_aiming and loop in self._loops

    def _end_together(self, busy: list[LaneLoop]) -> bool:
        ends = [self._end_s(loop) for loop in busy]
        return max(ends) - min(ends) <= TOGETHER_S

    def _is_early(self, busy: list[LaneLoop], now: float) -> bool:
        """Whether a cut over now would come early enough; of short steps, half is."""
        lead_s = min(LEAD_S, *(0.5 * self._load.last_s[loop.leader] for loop in busy))
        return max(map(self._end_s, busy)) - now >= lead_s

    def _busy(self) -> list[LaneLoop]:
        return [loop for loop in self._loops if loop.num_in_flight]

    def _end_s(self, loop: LaneLoop) -> float:
        return max(self._load.free_s[rank] for rank in loop.lane.ranks)
