"""What a request will cost a lane, from the cost model and the answers seen so far."""

from __future__ import annotations

from typing import NamedTuple

from nitsum.cost.protocol import CostModel
from nitsum.plan import Lane
from nitsum.sched.limits import LaneLimits
from nitsum.step import BatchShape

_FIRST_GUESS_TOKENS = 256.0
_WEIGHT = 0.05
_BUCKET_TOKENS = 32
_REMEMBERED = 2048
"""Looked-up times before they are asked for anew: a calibrating model changes slowly."""


class Work(NamedTuple):
    """Seconds of a lane's time."""

    prefill_s: float
    """Its prompt alone on the lane."""
    answer_s: float
    """Its answer as part of full decode batches: its share of each step."""
    latency_s: float
    """From the first token to the last, in such batches."""

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.answer_s


class Estimator:
    """Estimates for one engine; cheap enough to ask for every lane of every arrival."""

    def __init__(self, cost: CostModel, limits: LaneLimits) -> None:
        self.cost = cost
        self.limits = limits
        self._answers: dict[str, float] = {}
        self._prefill: dict[tuple[int, int], float] = {}
        self._decode: dict[int, float] = {}

    def note_answer(self, tier: str, num_tokens: int) -> None:
        """An answer of the tier is complete."""
        mean = self._answers.get(tier, _FIRST_GUESS_TOKENS)
        self._answers[tier] = mean + _WEIGHT * (num_tokens - mean)

    def answer_tokens(self, tier: str, max_tokens: int) -> float:
        """Tokens an answer of the tier will have: their mean, and never more than allowed."""
        return min(float(max_tokens), self._answers.get(tier, _FIRST_GUESS_TOKENS))

    def work(self, lane: Lane, num_prompt: int, answer_tokens: float) -> Work:
        step_s = self.decode_step_s(lane)
        return Work(
            self.prefill_s(lane, num_prompt),
            answer_tokens * step_s / self.limits.max_num_seqs,
            answer_tokens * step_s,
        )

    def prefill_s(self, lane: Lane, num_tokens: int) -> float:
        """A prompt alone on the lane, in chunks as large as a step may be."""
        bucket = -(-num_tokens // _BUCKET_TOKENS)
        key = (lane.group.degree, bucket)
        seconds = self._prefill.get(key)
        if seconds is None:
            if len(self._prefill) >= _REMEMBERED:
                self._prefill.clear()
                self._decode.clear()
            seconds = self._prefill[key] = self._price_prefill(lane, bucket * _BUCKET_TOKENS)
        return seconds

    def decode_step_s(self, lane: Lane) -> float:
        """A full batch of decodes at a context of 1,024 tokens."""
        seconds = self._decode.get(lane.group.degree)
        if seconds is None:
            count = self.limits.max_num_seqs
            shape = BatchShape(count, 1024 * count, 0, 0, count)
            seconds = self._decode[lane.group.degree] = self.cost.step_time(lane, shape)
        return seconds

    def _price_prefill(self, lane: Lane, num_tokens: int) -> float:
        most = self.limits.max_batch_tokens
        if num_tokens <= most:
            context = num_tokens * (num_tokens + 1) // 2
            return self.cost.step_time(lane, BatchShape(0, 0, num_tokens, context, 1))
        mean_context = most * num_tokens // 2
        chunk_s = self.cost.step_time(lane, BatchShape(0, 0, most, mean_context, 1))
        return chunk_s * num_tokens / most
