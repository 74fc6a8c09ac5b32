"""Classes of service: what a request may ask for and what is promised in return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nitsum.errors import ApiError, ConfigError, bad_request

OverCapacity = Literal["downgrade", "queue", "refuse"]


@dataclass(frozen=True)
class Tier:
    """One class of service.

    A tier promises either `ttft_s` and `tpot_s`, or that the whole answer is complete within
    `deadline_s`.
    """

    name: str
    level: int
    """Order between tiers: 0 is served first."""
    ttft_s: float | None = None
    """Promised time to first token, seconds."""
    tpot_s: float | None = None
    """Promised mean time per output token after the first, seconds."""
    deadline_s: float | None = None
    """Promised time from arrival to the last token, seconds."""
    price: float = 1.0
    """Multiplier on the token price."""
    min_share: float = 0.0
    """Share of token throughput this tier keeps while higher tiers have work, 0..1."""
    max_wait_s: float = 600.0
    """A request that waited this long is served before anything else of its lane."""
    queue_timeout_s: float = 1800.0
    """A request that waited this long for its first step is answered with `queue_timeout`."""
    max_queue_requests: int = 4096
    max_queue_tokens: int = 8_000_000
    over_capacity: OverCapacity = "queue"
    """What happens to a request that no lane can promise to serve in time."""

    def __post_init__(self) -> None:
        if self.deadline_s is None and (self.ttft_s is None or self.tpot_s is None):
            raise ConfigError(
                f"tier {self.name!r}: give ttft_s and tpot_s, or deadline_s; it has neither."
            )
        if not 0.0 <= self.min_share <= 1.0:
            raise ConfigError(f"tier {self.name!r}: min_share must lie in 0..1.")


PRIORITY = Tier("priority", 0, 0.3, 0.05, price=2.0, over_capacity="downgrade")
DEFAULT = Tier("default", 1, 2.0, 0.1, price=1.0)
FLEX = Tier("flex", 2, deadline_s=600.0, price=0.5, over_capacity="refuse", max_wait_s=300.0)
BATCH = Tier("batch", 3, deadline_s=1800.0, price=0.5, min_share=0.05, max_wait_s=900.0)

DEFAULT_TIERS = (PRIORITY, DEFAULT, FLEX, BATCH)

_ALIASES = {"fast": "priority", "scale": "priority", "standard": "default"}
SERVICE_TIERS = ("auto", "default", "standard", "flex", "priority", "fast", "scale", "batch")


class TierSet:
    """The tiers of one server, in order of urgency."""

    def __init__(self, tiers: tuple[Tier, ...] = DEFAULT_TIERS) -> None:
        self.ordered = tuple(sorted(tiers, key=lambda tier: tier.level))
        self._by_name = {tier.name: tier for tier in tiers}
        if len(self._by_name) != len(tiers) or len({t.level for t in tiers}) != len(tiers):
            raise ConfigError("Tier names and levels must be unique.")
        if sum(tier.min_share for tier in tiers) > 1.0:
            raise ConfigError("The tiers' min_share values add up to more than 1.")

    def __getitem__(self, name: str) -> Tier:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def names(self) -> tuple[str, ...]:
        return tuple(tier.name for tier in self.ordered)

    def below(self, tier: Tier) -> Tier | None:
        """The next lower tier, if there is one."""
        return next((other for other in self.ordered if other.level > tier.level), None)

    def resolve(self, service_tier: str | None, auto: str = "default") -> Tier:
        """The tier a client's `service_tier` asks for; raises `ApiError` when unknown."""
        asked = "auto" if service_tier is None else service_tier
        name = auto if asked == "auto" else _ALIASES.get(asked, asked)
        tier = self._by_name.get(name)
        if tier is None:
            raise self._unknown(asked)
        return tier

    def _unknown(self, asked: str) -> ApiError:
        known = ", ".join(("auto", *self.names()))
        return bad_request(
            f"Unknown service_tier {asked!r}. Use one of: {known}.", param="service_tier"
        )
