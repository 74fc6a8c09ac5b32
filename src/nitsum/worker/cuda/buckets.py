"""Batch sizes for which decode graphs exist, and which of them a step uses."""

from __future__ import annotations

from collections.abc import Sequence

from nitsum.messages import Work

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Padding costs little: decode reads weights, not rows, until a few hundred sequences."""


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Ascending; the last one holds every decode batch the engine sends, up to 256."""
    below = [size for size in SIZES if size < max_num_seqs]
    return (*below, min(max_num_seqs, SIZES[-1]))


def bucket_for(num_seqs: int, sizes: Sequence[int]) -> int | None:
    """The smallest size that holds `num_seqs`; None if no graph does."""
    return next((size for size in sizes if size >= num_seqs), None)


def is_decode(work: Sequence[Work]) -> bool:
    """One token of each sequence, each of which draws: what graphs are captured for."""
    return all(part.num_tokens == 1 and part.samples for part in work)
