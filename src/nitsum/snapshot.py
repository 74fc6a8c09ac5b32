"""What the engine has counted, as its status tells it."""

from __future__ import annotations

from typing import Literal

import msgspec


class Buckets(msgspec.Struct, frozen=True):
    """A histogram: `counts[i]` values were at most `bounds_s[i]`, the last count is the rest."""

    bounds_s: list[float]
    counts: list[int]
    sum_s: float


class Happening(msgspec.Struct, frozen=True):
    """Something worth telling a person; `count` times in a row, the last at `at_s`."""

    at_s: float
    kind: Literal["switch", "decision", "restart", "trouble"]
    text: str
    count: int = 1


class Restart(msgspec.Struct, frozen=True):
    """A generation of workers that took over from one that died."""

    restart_s: float
    num_replayed: int
    """Requests that go on."""

    @property
    def words(self) -> str:
        return f"Workers restarted in {self.restart_s:.1f} s; {self.num_replayed} request(s) go on."


class Tally(msgspec.Struct, frozen=True):
    """What the engine has counted since it started, and what happened last."""

    preemptions: list[tuple[str, str, int]]
    """(tier displaced, in favour of, times)"""
    promotions: list[tuple[str, int]]
    refusals: list[tuple[str, str, int]]
    """(tier, code, times)"""
    num_output_tokens: int
    num_evicted_blocks: int
    num_restarts: int
    num_replayed: int
    last_restarts: list[Restart]
    """Some of them, the oldest first; empty before the first."""
    rank_busy_s: list[float]
    """Time spent in steps, by rank."""
    rank_waiting_s: list[float]
    """Of that, waiting for peers inside collectives, as far as ranks can tell."""
    rank_busy_ratio: list[float]
    """The same as a share of the last seconds, 0..1."""
    switch_gaps: Buckets
    """Longest time without a token of each stream that a switch moved."""
    plan_memory_bytes: dict[str, int]
    """What a plan being resident costs, all ranks together: the buffers its lanes communicate
    through. Weights and KV are views that all plans share."""
    memory_bytes: list[dict[str, int]]
    """By rank and what it is for."""
    recent: list[Happening]
    """The oldest first."""

    @property
    def last_restart_s(self) -> float:
        """How long the last restart of the workers took; 0 before the first."""
        return self.last_restarts[-1].restart_s if self.last_restarts else 0.0
