"""A step as decided, and what deciding it did to other sequences."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from nitsum.sequence import Sequence
from nitsum.step import EMPTY, Chunk


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


class Composed:
    """What `LaneScheduler.compose` hands to the engine."""

    __slots__ = (
        "all_bear_s",
        "chunks",
        "decodes",
        "displaced",
        "first_tight_s",
        "most_tokens",
        "next_due_s",
        "now",
        "num_free_slots",
        "num_new_blocks",
        "others_bear_s",
        "part",
        "predicted_s",
        "preempted",
        "promoted",
        "put_back",
        "resumed",
        "shape",
        "start_s",
        "tight_s",
        "tokens",
    )

    def __init__(
        self,
        num_levels: int,
        num_free_slots: int,
        now: float,
        start_s: float,
        part: float = 1.0,
    ) -> None:
        self.now = now
        self.start_s = start_s
        """When the step will start: the steps before it on its ranks are done by then."""
        self.num_free_slots = num_free_slots
        """Rows on the workers that sequences may still take."""
        self.part = part
        """Of the tokens a step may compute: what one with decodes in it does."""
        self.num_new_blocks = 0
        """Blocks of KV that room was found for, of prompts."""
        self.chunks: list[Chunk] = []
        self.shape = EMPTY
        self.decodes = EMPTY
        """Its shape before any prompt was taken on."""
        self.predicted_s = 0.0
        self.displaced: list[tuple[Sequence, Sequence]] = []
        """(paused, in favour of)"""
        self.resumed: list[Resumption] = []
        self.preempted: list[Preemption] = []
        """Those whose KV was not kept are to be queued again."""
        self.put_back: list[Sequence] = []
        """Prompts of which nothing was computed that gave their room back and wait again."""
        self.promoted: list[Sequence] = []
        self.tokens = [0] * num_levels
        """Positions computed, by level."""
        self.tight_s = [inf] * num_levels
        """How long the step may take for the decodes of each level."""
        self.first_tight_s = inf
        """How long the step may take for those it draws the first token of."""
        self.others_bear_s = inf
        """How long the step may take for lanes on the same ranks and for who comes right after."""
        self.all_bear_s = inf
        """The same for those and all of its decodes."""
        self.most_tokens = 0
        """Positions it may compute, those of prompts included."""
        self.next_due_s = inf
        """When the first of its decodes must have its token after this step's."""

    def take_out(self, sequence: Sequence) -> None:
        """The sequence is not part of this step after all."""
        self.chunks[:] = [chunk for chunk in self.chunks if chunk.sequence is not sequence]

    def has_lost(self, sequence: Sequence) -> bool:
        return any(entry.sequence is sequence for entry in self.preempted)
