"""One record for each call that asked for an answer, and one for each run of a server.

Money is counted in billionths of the currency unit (`nano`), so that sums are exact. A price is per
million tokens, as everybody names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from nitsum.tier import Tier, TierSet

NANO = 10**9
_NANO_PER_TOKEN = NANO // 10**6
"""Of a price of 1 per million tokens."""

Status = Literal["ok", "aborted", "refused", "error"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One call, however many answers it asked for. Tokens are counted as its usage reports them."""

    id: str
    """The completion's id, unique across servers."""
    request_id: str
    """`x-request-id`, which callers may choose."""
    run_id: str
    at_ms: int
    """Arrival, Unix time."""
    key_id: str
    tenant: str
    model: str
    endpoint: str
    chain_id: str | None = None
    batch_id: str | None = None
    tier_asked: str
    tier_served: str
    reason: str | None = None
    """Why these two differ."""
    num_prompt: int
    num_cached: int = 0
    num_output: int
    queue_ms: float | None = None
    ttft_ms: float | None = None
    """Arrival to first token; the latest of several answers."""
    tpot_ms: float | None = None
    """Mean time of later tokens; the slowest of several answers."""
    duration_ms: float
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    deadline_ms: float | None = None
    """Targets of the tier it was served as."""
    met: bool | None = None
    """All of them; None when it did not end by itself."""
    plan: str = ""
    lane: str = ""
    num_displaced: int = 0
    status: Status
    error_code: str | None = None
    billed: bool = False
    price_input: float = 0.0
    price_output: float = 0.0
    """Per million tokens, at multiplier 1."""
    multiplier: float = 1.0
    """The tier's price; a token costs its price times this."""
    cost_nano: int = 0
    credit_nano: int = 0
    """Given back because a promise was missed; `cost_nano` is before it."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A server that was up from `started_ms` to `seen_ms`, with this much to pay for."""

    id: str
    started_ms: int
    seen_ms: int
    num_ranks: int
    device: str


@dataclass(frozen=True)
class Prices:
    """Of a million tokens at multiplier 1, in the operator's currency."""

    input: float = 0.0
    output: float = 0.0

    def cost_nano(self, num_prompt: int, num_output: int, multiplier: float) -> int:
        """Of one call, in billionths."""
        at_one = num_prompt * self.input + num_output * self.output
        return round(at_one * multiplier * _NANO_PER_TOKEN)


def credit_nano(cost_nano: int, tier: Tier, tiers: TierSet) -> int:
    """What a call that missed the targets of `tier` gets back.

    A tier whose overflow is served (and billed) as a lower one sells urgency: a miss delivered what
    the next tier would have, so it costs what that one costs. Other tiers give nothing back.
    """
    if tier.over_capacity != "downgrade":
        return 0
    lower = [other for other in tiers.ordered if other.level > tier.level]
    if not lower or tier.price <= lower[0].price:
        return 0
    return round(cost_nano * (1 - lower[0].price / tier.price))
