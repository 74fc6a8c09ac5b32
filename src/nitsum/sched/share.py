"""Guaranteed shares: a tier earns credit while it waits, and spends it when it is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Shares:
    """Credits in tokens, by level.

    In each step a level that has work waiting earns its share of the step's tokens; tokens it is
    given are taken off. At `quantum_tokens` it is *owed* a turn: its next request goes before
    higher levels into a free slot, and its running ones keep theirs until the credit is spent.
    Between the two thresholds nothing changes, so slots do not flip to and fro.
    """

    def __init__(self, shares: Sequence[float], quantum_tokens: int) -> None:
        self.shares = tuple(shares)
        self.quantum_tokens = quantum_tokens
        self.credits = [0.0] * len(self.shares)
        self._any = any(self.shares)

    def note_step(self, tokens_by_level: Sequence[int], waits: Callable[[int], bool]) -> None:
        """A step gave each level so many tokens; `waits` says which still have work queued."""
        if not self._any:
            return
        total = sum(tokens_by_level)
        for level, share in enumerate(self.shares):
            if not share:
                continue
            is_waiting = waits(level)
            earned = share * total if is_waiting or tokens_by_level[level] else 0.0
            credit = self.credits[level] + earned - tokens_by_level[level]
            # Idle levels keep no debt, and nobody saves up for more than a few turns.
            floor = -float(self.quantum_tokens) if is_waiting else 0.0
            self.credits[level] = min(max(credit, floor), 4.0 * self.quantum_tokens)

    def owed(self, waits: Callable[[int], bool]) -> int | None:
        """The level that has a turn coming, lowest first."""
        if not self._any:
            return None
        for level in range(len(self.shares) - 1, 0, -1):
            if self.credits[level] >= self.quantum_tokens and waits(level):
                return level
        return None

    def protects(self, level: int) -> bool:
        """Whether running work of the level keeps its slot."""
        return self.shares[level] > 0 and self.credits[level] > 0
