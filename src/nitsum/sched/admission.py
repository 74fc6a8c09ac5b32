"""Whether a request may queue at all."""

from __future__ import annotations

from collections.abc import Iterable

from nitsum.errors import ApiError
from nitsum.request import Request, Sequence
from nitsum.tier import TierSet


class Admission:
    """Bounds each tier's queue by requests and by tokens."""

    def __init__(self, tiers: TierSet) -> None:
        self.tiers = tiers

    def check(self, request: Request, waiting: Iterable[Sequence]) -> None:
        """Raise the `ApiError` that the client should see, or accept by returning."""
        tier = self.tiers[request.tier]
        queued = [seq for seq in waiting if seq.tier == tier.name and not seq.num_restarts]
        num_tokens = sum(len(seq.tokens) for seq in queued)
        too_many = len(queued) >= tier.max_queue_requests
        if too_many or num_tokens + len(request.prompt) > tier.max_queue_tokens:
            bound = (
                f"{tier.max_queue_requests} requests"
                if too_many
                else f"{tier.max_queue_tokens} tokens"
            )
            raise ApiError(
                f"The queue of tier {tier.name!r} is full ({bound}). Try again later.",
                status=429,
                type="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
