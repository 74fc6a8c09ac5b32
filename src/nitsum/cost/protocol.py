"""The one question all deciding code asks: how long will this take?"""

from __future__ import annotations

from typing import Protocol

from nitsum.plan import Lane
from nitsum.step import BatchShape


class CostModel(Protocol):
    """Predictions in seconds. Implementations are pure and monotone in every count."""

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        """One forward pass of `lane` over `batch`, from launch to its tokens on the host."""
        ...

    def move_time(self, num_bytes: int) -> float:
        """Pulling `num_bytes` of KV into one rank out of its peers."""
        ...

    def offload_time(self, num_bytes: int) -> float:
        """Copying `num_bytes` of KV between one rank and host memory."""
        ...


class FixedCost:
    """A fake for tests: a base per step and a price per token, the same at every degree."""

    def __init__(self, base_s: float = 0.01, per_token_s: float = 1e-4) -> None:
        self.base_s = base_s
        self.per_token_s = per_token_s

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        return self.base_s + self.per_token_s * batch.num_tokens

    def move_time(self, num_bytes: int) -> float:
        return num_bytes / 1e9

    def offload_time(self, num_bytes: int) -> float:
        return num_bytes / 1e9
