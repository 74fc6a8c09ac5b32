"""How many prefill tokens a step may take on: a search over a monotone cost."""

from __future__ import annotations

from collections.abc import Callable

from nitsum.step import BatchShape, make_shape

HALVE_EVERY = 4
"""Of the looks at times between two counts, one halves what is between them, come what may."""

StepTime = Callable[[BatchShape], float]


def with_prefill(shape: BatchShape, start: int, num_tokens: int, samples: bool) -> BatchShape:
    """The shape after adding a chunk of `num_tokens` from position `start` on."""
    num_decode, decode_context, prefill, prefill_context, num_samples = shape
    context = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return make_shape(
        (
            num_decode,
            decode_context,
            prefill + num_tokens,
            prefill_context + context,
            num_samples + samples,
        )
    )


def largest_chunk(
    step_time: StepTime,
    shape: BatchShape,
    start: int,
    num_left: int,
    most: int,
    allowed_s: float,
    near: int = 0,
) -> int:
    """The largest chunk, up to `most` of the `num_left` tokens, for which the step takes at most
    `allowed_s`; 0 when not even one token fits. A good guess, `near`, saves looks."""

    def seconds(num_tokens: int) -> float:
        samples = num_tokens == num_left
        return step_time(with_prefill(shape, start, num_tokens, samples))

    high = min(num_left, most)
    if high <= 0:
        return 0
    high_s = seconds(high)
    if high_s <= allowed_s:
        return high
    under_s = allowed_s - step_time(shape)
    if under_s < 0.0:
        return 0
    return _last_fitting(seconds, high, under_s, high_s - allowed_s, allowed_s, near)


def _last_fitting(
    seconds: Callable[[int], float],
    high: int,
    under_s: float,
    over_s: float,
    allowed_s: float,
    near: int,
) -> int:
    """The last count before `high` that takes no more than `allowed_s`. None at all takes `under_s`
    less than that, `high` takes `over_s` more.

    The first look is at `near`, if that is above 0, the others are where a straight line between
    the two ends would cross. An end that stays twice counts half from then on (the Illinois rule),
    and where that does not help, halving does.
    """
    low, num_looks = 0, 0
    num_fit = num_over = 0
    while high - low > 1:
        num_looks += 1
        way = under_s / (under_s + over_s) if num_looks % HALVE_EVERY else 0.5
        middle = near if near > 0 and num_looks == 1 else low + int(way * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        rest_s = allowed_s - seconds(middle)
        if rest_s >= 0.0:
            low, under_s = middle, rest_s
            num_fit, num_over = num_fit + 1, 0
        else:
            high, over_s = middle, -rest_s
            num_fit, num_over = 0, num_over + 1
        under_s *= 0.5 if num_over > 1 else 1.0
        over_s *= 0.5 if num_fit > 1 else 1.0
    return low
