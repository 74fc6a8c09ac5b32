"""A step as decided, and what deciding it did to other sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nitsum.request import Sequence
from nitsum.step import BatchShape, Chunk


class Preemption(NamedTuple):
    """A sequence lost its room in device memory to another."""

    sequence: Sequence
    by: Sequence
    kept: bool
    """Its KV is in host memory; otherwise it will be computed again."""


class Resumption(NamedTuple):
    """A sequence that had run before runs again."""

    sequence: Sequence
    num_recomputed: int
    rejoins: bool = False
    """Its row does not exist in this lane: it gives up its slot and joins anew."""


@dataclass(slots=True)
class Composed:
    """What `LaneScheduler.compose` hands to the engine."""

    num_levels: int
    num_free_slots: int
    """Rows on the workers that sequences may still take."""
    now: float
    start_s: float
    """When the step will start: the steps before it on its ranks are done by then."""
    part: float = 1.0
    """Of the tokens a step may compute: what one with decodes in it does."""
    num_new_blocks: int = 0
    """Blocks of KV that room was found for, of prompts."""
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    shape: BatchShape = field(default_factory=BatchShape)
    predicted_s: float = 0.0
    displaced: list[tuple[Sequence, Sequence]] = field(
        default_factory=list[tuple[Sequence, Sequence]]
    )
    """(paused, in favour of)"""
    resumed: list[Resumption] = field(default_factory=list[Resumption])
    preempted: list[Preemption] = field(default_factory=list[Preemption])
    """Those whose KV was not kept are to be queued again."""
    put_back: list[Sequence] = field(default_factory=list[Sequence])
    """Prompts of which nothing was computed that gave their room back and wait again."""
    promoted: list[Sequence] = field(default_factory=list[Sequence])
    tokens: list[int] = field(default_factory=list[int])
    """Positions computed, by level."""
    tight_s: list[float] = field(default_factory=list[float])
    """How long the step may take for the decodes of each level."""
    first_tight_s: float = float("inf")
    """How long the step may take for those it draws the first token of."""
    others_bear_s: float = float("inf")
    """How long the step may take for lanes on the same ranks and for who comes right after it."""
    decodes: BatchShape = field(default_factory=BatchShape)
    """Its shape before any prompt was taken on."""
    next_due_s: float = float("inf")
    """When the first of its decodes must have its token after this step's."""

    def __post_init__(self) -> None:
        self.tokens = [0] * self.num_levels
        self.tight_s = [float("inf")] * self.num_levels

    def take_out(self, sequence: Sequence) -> None:
        """The sequence is not part of this step after all."""
        self.chunks[:] = [chunk for chunk in self.chunks if chunk.sequence is not sequence]

    def has_lost(self, sequence: Sequence) -> bool:
        return any(entry.sequence is sequence for entry in self.preempted)
