"""Step shapes for which graphs exist, and which of them a step uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nitsum.messages import Work

DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Padding costs little: decode reads weights, not rows, until a few hundred sequences."""

CHUNK_TOKENS = (*range(64, 1024, 64), *range(1024, 2049, 128))
"""Close to each other, since products take as long as they have rows."""

GRAPHED_TOKENS = 2048
"""Largest step that gets a graph. Up to about 640 tokens times the degree, launching kernel by
kernel (14 ms for 32 layers) is slower than the device. Beyond, a graph gains no time, but while a
worker launches it hears and says nothing: answers were up to 20 ms late."""

FEW_SEQS = 8
"""Most steps with chunks have few sequences (an idle lane's prompts) or many (a busy lane's)."""


class StepShape(NamedTuple):
    """What a step is padded to. A decode shape has one token a sequence, each of which draws."""

    num_tokens: int
    num_seqs: int
    is_decode: bool
    has_graph: bool


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Ascending; the last one holds every decode batch the engine sends, up to 512."""
    below = [size for size in DECODE_SIZES if size < max_num_seqs]
    return (*below, min(max_num_seqs, DECODE_SIZES[-1]))


def decode_shapes(max_num_seqs: int) -> list[StepShape]:
    """All decode shapes of a lane, the smallest first."""
    return [StepShape(size, size, True, True) for size in decode_sizes(max_num_seqs)]


def chunk_shapes(max_num_seqs: int, max_batch_tokens: int) -> list[StepShape]:
    """All shapes with chunks that a lane has graphs for, the cheapest first.

    The largest step is one of them whatever its size: where prompts wait, most steps are full.
    """
    sizes = [tokens for tokens in CHUNK_TOKENS if tokens <= max_batch_tokens]
    if max_batch_tokens <= GRAPHED_TOKENS:
        sizes.append(max_batch_tokens)
    widths = chunk_widths(max_num_seqs)
    return [StepShape(size, width, False, True) for size in sorted(set(sizes)) for width in widths]


def padded_draws(num_draws: int, max_draws: int) -> int:
    """Rows that logits are computed for: one of `DECODE_SIZES`, or 0.

    Libraries choose and load code by the number of rows; loading waits until the device is idle.
    """
    if not num_draws:
        return 0
    size = next((size for size in DECODE_SIZES if size >= num_draws), max_draws)
    return min(size, max_draws)


def chunk_widths(max_num_seqs: int) -> list[int]:
    """Numbers of sequences that steps with chunks are padded to.

    Graph or not: kernels are compiled for each of them, which must not happen under traffic.
    """
    return sorted({min(FEW_SEQS, max_num_seqs), max_num_seqs})


def shape_for(
    work: Sequence[Work], shapes: Sequence[StepShape], widths: Sequence[int]
) -> StepShape:
    """The first of `shapes` that holds the step; if none does, one without a graph, of the step's
    own tokens and the first of `widths` that holds its sequences."""
    num_tokens = sum(part.num_tokens for part in work)
    decode = is_decode(work)
    for shape in shapes:
        if shape.is_decode != decode or shape.num_seqs < len(work):
            continue
        if shape.num_tokens >= num_tokens:
            return shape
    width = next(width for width in widths if width >= len(work))
    return StepShape(num_tokens, width, False, False)


def is_decode(work: Sequence[Work]) -> bool:
    """One token of each sequence, each of which draws."""
    return all(part.num_tokens == 1 and part.samples for part in work)
