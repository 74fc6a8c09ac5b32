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

    def seconds(num_tokens: int) -> float:
        samples = num_tokens == num_left
        return step_time(with_prefill(shape, start, num_tokens, samples))

    high = min(num_left, most)
    if high <= 0:
        return 0
    high_s = seconds(high)
    if high_s <= allowed_s:
        return high
    low, low_s = 0, step_time(shape)
    if low_s > allowed_s:
        return 0
    halve = False
    while high - low > 1:  # low fits, high does not; times are nearly straight lines
        way = 0.5 if halve else (allowed_s - low_s) / (high_s - low_s)
        middle = min(max(low + int(way * (high - low)), low + 1), high - 1)
        middle_s = seconds(middle)
        if middle_s <= allowed_s:
            low, low_s = middle, middle_s
        else:
            high, high_s = middle, middle_s
        halve = not halve
    return low
