"""A lane as the engine runs it: its scheduler and its steps in flight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from nitsum.plan import Group, Lane
from nitsum.sched.lane import LaneScheduler
from nitsum.sequence import Sequence
from nitsum.step import BatchShape, Chunk

PATIENCE_STEPS = 4
"""Steps, times the number of lanes, that others may be sent before a lane's turn comes anyway."""

STEPS_AHEAD = 2
"""Steps a rank may have in flight: one running, one waiting, so that it never idles."""

SEND_AHEAD_S = 0.01
"""A rank gets its next step no earlier than this before it is through with the one it has: whoever
arrives until then is part of it. Far more than it takes to compose a step and send it."""


@dataclass
class LaneLoop:
    """One lane's loop between two turns of the engine."""

    lane: Lane
    """May get another role, never another group."""
    scheduler: LaneScheduler
    num_in_flight: int = 0
    last_sent: int = 0
    """Number of the last step sent: lanes that share ranks take turns by it."""

    def __post_init__(self) -> None:
        self.group: Group = self.lane.group
        self.leader: int = self.group.leader

    @property
    def draining(self) -> bool:
        return self.scheduler.drains


TurnOrder = Callable[[LaneLoop], tuple[bool, float, int]]


def turn_order(num_lanes: int, last_sent: int, soon_s: float) -> TurnOrder:
    """A key for lanes that share ranks: first one passed over for long, then the one whose next
    step must start soonest. Where nobody's must start before `soon_s`, they take turns."""
    oldest = last_sent - PATIENCE_STEPS * num_lanes

    def key(loop: LaneLoop) -> tuple[bool, float, int]:
        return (loop.last_sent > oldest, min(loop.scheduler.next_start_s, soon_s), loop.last_sent)

    return key


class StepInFlight(NamedTuple):
    """What the engine must remember until a step's result arrives."""

    loop: LaneLoop
    step_id: int
    chunks: tuple[Chunk, ...]
    lost: set[Sequence]
    """Who lost its KV since: the step confirms nothing of it."""
    sent_s: float
    shape: BatchShape
    predicted_s: float


@dataclass
class RankLoad:
    """Steps in flight per rank, and ranks kept in this turn for a lane that waits for others."""

    num_in_flight: list[int]
    send_ahead_s: float = SEND_AHEAD_S
    """How long before a rank is through with its steps it gets the next one."""
    held: set[int] = field(default_factory=set[int])
    ahead_s: list[float] = field(default_factory=list[float])
    """Predicted time of a rank's steps in flight."""
    free_s: list[float] = field(default_factory=list[float])
    """When each rank will be through with them."""
    last_s: list[float] = field(default_factory=list[float])
    """Predicted time of the step sent to each rank last."""
    _shared: frozenset[int] = frozenset()
    """Ranks that several lanes use."""
    _led: frozenset[int] = frozenset()
    """Ranks that one lane uses alone which shares others: those say when it may go on."""
    _send_at_s: list[float] = field(default_factory=list[float])
    """When each rank should get its next step; infinite while it has no room for one, or is led."""

    def __post_init__(self) -> None:
        self.ahead_s = [0.0 for _ in self.num_in_flight]
        self.free_s = [0.0 for _ in self.num_in_flight]
        self.last_s = [0.0 for _ in self.num_in_flight]
        self._send_at_s = [0.0 for _ in self.num_in_flight]

    def is_due(self, now: float) -> bool:
        """Some rank should get a step now."""
        return min(self._send_at_s) <= now

    def share(self, loops: Iterable[LaneLoop]) -> None:
        """These are the lanes from now on. Ranks that several of them use are filled at once: their
        lanes would wait for each other. Other ranks of such lanes ask for nothing themselves."""
        lanes = [loop.group.ranks for loop in loops]
        used = Counter(rank for ranks in lanes for rank in ranks)
        shared = self._shared = frozenset(rank for rank, count in used.items() if count > 1)
        meeting = [ranks for ranks in lanes if not shared.isdisjoint(ranks)]
        self._led = frozenset(rank for ranks in meeting for rank in ranks) - shared
        self._plan_all()

    def send_ahead(self, seconds: float) -> None:
        """Ranks get their next steps so long before they are through, from now on."""
        if seconds != self.send_ahead_s:
            self.send_ahead_s = seconds
            self._plan_all()

    def _plan_all(self) -> None:
        for rank in range(len(self._send_at_s)):
            self._plan(rank)

    def _plan(self, rank: int) -> None:
        num_in_flight, at_s = self.num_in_flight[rank], 0.0
        if num_in_flight >= STEPS_AHEAD or rank in self._led:
            at_s = inf
        elif num_in_flight and rank not in self._shared:
            at_s = self.free_s[rank] - self.send_ahead_s
        self._send_at_s[rank] = at_s

    def due(self, loops: Iterable[LaneLoop], now: float) -> list[LaneLoop]:
        """Lanes that should get a step now: their first rank is due (all are if no other lane uses
        them). Without room, a lane matters only to those it shares ranks with: they are kept for
        it."""
        at_s = self._send_at_s
        return [loop for loop in loops if loop.scheduler.neighbours or at_s[loop.leader] <= now]

    def next_send_s(self, now: float) -> float:
        """When the next step is due that waits for its time, not for room."""
        return min([at_s for at_s in self._send_at_s if at_s > now], default=inf)

    def free_for(self, loop: LaneLoop) -> bool:
        """Whether all ranks of the lane can take a step now; if not, keep those that can for it."""
        in_flight, held = self.num_in_flight, self.held
        ranks = loop.lane.group.ranks
        for rank in ranks:
            if in_flight[rank] >= STEPS_AHEAD or rank in held:
                held.update(ranks)
                return False
        return True

    def start_s(self, loop: LaneLoop, now: float) -> float:
        """When a step sent now would start."""
        return max(now, *[self.free_s[rank] for rank in loop.lane.ranks])

    def sent(self, step: StepInFlight) -> None:
        end_s = self.start_s(step.loop, step.sent_s) + step.predicted_s
        for rank in step.loop.lane.ranks:
            self.num_in_flight[rank] += 1
            self.ahead_s[rank] += step.predicted_s
            self.free_s[rank] = end_s
            self.last_s[rank] = step.predicted_s
            self._plan(rank)

    def ended(self, step: StepInFlight, now: float) -> None:
        for rank in step.loop.lane.ranks:
            self.num_in_flight[rank] -= 1
            self.ahead_s[rank] -= step.predicted_s
            if not self.num_in_flight[rank]:
                self.ahead_s[rank] = 0.0
            self.free_s[rank] = now + self.ahead_s[rank]
            self._plan(rank)
