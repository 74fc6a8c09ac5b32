"""How many prefill tokens a step may take on: a search over a monotone cost."""

from __future__ import annotations

from collections.abc import Callable

from nitsum.step import BatchShape

StepTime = Callable[[BatchShape], float]


def with_prefill(shape: BatchShape, start: int, num_tokens: int, samples: bool) -> BatchShape:
    """The shape after adding a chunk of `num_tokens` from position `start` on."""
    return BatchShape(
        shape.num_decode,
        shape.decode_context_tokens,
        shape.prefill_tokens + num_tokens,
        shape.prefill_context_tokens + num_tokens * start + num_tokens * (num_tokens + 1) // 2,
        shape.num_samples + samples,
    )


def largest_chunk(
    step_time: StepTime, shape: BatchShape, start: int, num_left: int, most: int, allowed_s: float
) -> int:
    """The largest chunk, up to `most` of the `num_left` tokens, for which the step takes at most
    `allowed_s`; 0 when not even one token fits."""

    def fits(num_tokens: int) -> bool:
        samples = num_tokens == num_left
        return step_time(with_prefill(shape, start, num_tokens, samples)) <= allowed_s

    high = min(num_left, most)
    if high <= 0 or fits(high):
        return max(high, 0)
    low = 0  # fits, or is nothing at all; high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
