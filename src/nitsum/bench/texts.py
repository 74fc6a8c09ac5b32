"""Where two texts part, and whether the reference could have gone either way there."""

from __future__ import annotations

import itertools

from nitsum.bench.reference import from_bytes

CLOSE_LOGITS = 1e-3
"""Two best logits of the reference nearer than this may change places in another layout."""


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that is not the same, a missing one included."""
    for index, (x, y) in enumerate(itertools.zip_longest(a, b)):
        if x != y:
            return index
    return None


def best_two_gap(logits: bytes) -> float:
    """How much the best logit is above the second."""
    best = from_bytes([logits])[0].topk(2).values
    return (best[0] - best[1]).item()
