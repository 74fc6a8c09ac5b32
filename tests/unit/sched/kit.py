"""Sequences as a scheduler sees them."""

from __future__ import annotations

from itertools import count

from nitsum.request import Request, SamplingParams
from nitsum.sequence import Sequence

_ids = count()


def make_sequence(
    num_prompt: int = 8,
    *,
    tier: str = "default",
    tenant: str = "",
    arrival_s: float = 0.0,
    latest_start_s: float | None = None,
    lost_after_s: float = float("inf"),
    order: int = 0,
    max_tokens: int = 16,
) -> Sequence:
    request = Request(
        f"s{next(_ids)}",
        [1] * num_prompt,
        SamplingParams(max_tokens=max_tokens),
        tier=tier,
        tenant=tenant,
        arrival_s=arrival_s,
        order=order,
    )
    sequence = Sequence(request)
    if latest_start_s is not None:
        sequence.latest_start_s = latest_start_s
    sequence.lost_after_s = lost_after_s
    return sequence
