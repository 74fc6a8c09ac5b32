"""A lane as the engine runs it: its scheduler and its steps in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

from nitsum.plan import Group, Lane
from nitsum.sched.lane import LaneScheduler
from nitsum.step import Chunk

STEPS_AHEAD = 2
"""Steps a rank may have in flight: one running, one waiting, so that it never idles."""


@dataclass
class LaneLoop:
    """One lane's loop between two turns of the engine."""

    lane: Lane
    scheduler: LaneScheduler
    draining: bool = False
    num_in_flight: int = 0
    last_sent: int = 0
    """Number of the last step sent: lanes that share ranks take turns by it."""

    @property
    def group(self) -> Group:
        return self.lane.group


@dataclass(frozen=True)
class StepInFlight:
    """What the engine must remember until a step's result arrives."""

    loop: LaneLoop
    step_id: int
    chunks: tuple[Chunk, ...]
    restarts: tuple[int, ...]
    """`num_restarts` of each chunk's sequence when the step was sent."""
    sent_s: float


@dataclass
class RankLoad:
    """Steps in flight per rank, and ranks kept in this turn for a lane that waits for others."""

    num_in_flight: list[int]
    held: set[int] = field(default_factory=set[int])

    def free_for(self, loop: LaneLoop) -> bool:
        """Whether all ranks of the lane can take a step now; if not, keep those that can for it."""
        in_flight, held = self.num_in_flight, self.held
        ranks = loop.lane.ranks
        for rank in ranks:
            if in_flight[rank] >= STEPS_AHEAD or rank in held:
                held.update(ranks)
                return False
        return True

    def add(self, loop: LaneLoop, count: int) -> None:
        for rank in loop.lane.ranks:
            self.num_in_flight[rank] += count
