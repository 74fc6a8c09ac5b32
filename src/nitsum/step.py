"""A step as the scheduler composes it, its shape as the cost model sees it, and what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from nitsum.plan import Lane
from nitsum.sequence import Sequence


class Chunk(NamedTuple):
    """`num_tokens` positions of a sequence from `start` on; `samples` draws a token after them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


make_chunk: Callable[[tuple[Sequence, int, int, bool]], Chunk] = partial(
    tuple.__new__,  # pyright: ignore[reportUnknownMemberType]
    Chunk,
)
"""What `Chunk(...)` does in a third of the time: a busy engine makes 100,000 a second."""


@dataclass(frozen=True)
class StepPlan:
    """One forward pass of one lane, decided and not yet sent."""

    lane: Lane
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class BatchShape(NamedTuple):
    """What a step costs depends on this and the lane's degree only.

    `prefill_context_tokens` sums, over prefill tokens, the context each attends to; it is what the
    quadratic part of attention costs.
    """

    num_decode: int = 0
    decode_context_tokens: int = 0
    prefill_tokens: int = 0
    prefill_context_tokens: int = 0
    num_samples: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_decode + self.prefill_tokens


make_shape: Callable[[tuple[int, int, int, int, int]], BatchShape] = partial(
    tuple.__new__,  # pyright: ignore[reportUnknownMemberType]
    BatchShape,
)
"""The same for `BatchShape(...)`."""
EMPTY = BatchShape()
"""No step takes less."""


def batch_shape(chunks: tuple[Chunk, ...]) -> BatchShape:
    """The shape of a composed step; a chunk of one sampling token counts as decode."""
    num_decode = decode_context = prefill = prefill_context = num_samples = 0
    for chunk in chunks:
        num_samples += chunk.samples
        if chunk.num_tokens == 1 and chunk.samples:
            num_decode += 1
            decode_context += chunk.start + 1
        else:
            n = chunk.num_tokens
            prefill += n
            prefill_context += n * chunk.start + n * (n + 1) // 2
    return BatchShape(num_decode, decode_context, prefill, prefill_context, num_samples)


class StepWork(NamedTuple):
    """The least that one rank has to do for a step."""

    num_bytes: int
    """Read: weights once, and the KV of decodes."""
    flops: int
    """Of products and of prompts' attention."""


class RankTime(NamedTuple):
    """What a step took one rank of its lane."""

    step_id: int
    seconds: float
    """Waiting for the others included."""
    waited_s: float
    """Of that, in collectives, as far as the rank can tell."""


TIMES_A_REPORT = 32


class RankTimes:
    """Gathers what steps took a rank, so that they can be told a few at a time."""

    def __init__(self) -> None:
        self._times: list[RankTime] = []

    def add(self, time: RankTime) -> list[RankTime]:
        """All that was gathered, once there is enough of it; else nothing."""
        self._times.append(time)
        if len(self._times) < TIMES_A_REPORT:
            return []
        told, self._times = self._times, []
        return told
