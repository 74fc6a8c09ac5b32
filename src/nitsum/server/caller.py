"""What the headers of a call (and the few body fields they stand in for) say about it."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from nitsum.errors import ApiError, bad_request
from nitsum.server.keyfile import Key
from nitsum.server.keys import clamp
from nitsum.server.schema import CallerBody
from nitsum.tier import TierSet

_TIER_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
_FAIRNESS_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
_TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
_TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
_CHAIN_HEADER = "x-nitsum-chain-id"
_CHAIN_DEADLINE_HEADER = "x-nitsum-chain-deadline-ms"
_MAX_NAME_CHARS = 256

Headers = Mapping[str, str]


@dataclass(frozen=True)
class Caller:
    """Who asks, how urgently, and since when. Times are seconds on the host's monotonic clock."""

    request_id: str
    """`x-request-id` of the response."""
    arrival_s: float
    tier: str
    """What it may have: asked for, and no more urgent than its key allows."""
    tier_asked: str
    tenant: str = ""
    """With whom it shares fairly: its key's tenant, or without keys whom it names."""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    chain_id: str | None = None
    chain_deadline_s: float | None = None
    key: Key | None = None
    endpoint: str = ""
    batch_id: str | None = None
    """The batch it is a line of."""
    reason: str | None = None
    """Why `tier` is not `tier_asked`."""

    @property
    def account(self) -> str:
        """The tenant that pays; without keys, all are one."""
        return "" if self.key is None else self.key.tenant


@dataclass(frozen=True)
class Entrance:
    """How a call came in: what the server itself knows of it, before any field is read."""

    request_id: str
    arrival_s: float
    endpoint: str = ""
    key: Key | None = None
    batch_id: str | None = None


def read_caller(
    headers: Headers,
    body: CallerBody,
    tiers: TierSet,
    default_tier: str,
    entrance: Entrance,
) -> Caller:
    """The caller of a completion; raises `ApiError` (400) that names the header or field."""
    deadline_s = _seconds(headers, (_CHAIN_DEADLINE_HEADER,))
    chain_id = _name(headers, (_CHAIN_HEADER,)) or (body.metadata or {}).get("chain_id")
    if deadline_s is not None and not chain_id:
        raise bad_request(
            f"{_CHAIN_DEADLINE_HEADER} needs {_CHAIN_HEADER} or metadata.chain_id beside it.",
            _CHAIN_DEADLINE_HEADER,
        )
    key, arrival_s = entrance.key, entrance.arrival_s
    auto = default_tier if key is None or key.default_tier is None else key.default_tier
    if entrance.batch_id is not None:
        auto = tiers.ordered[-1].name
    asked = _tier(headers, body.service_tier, tiers, auto)
    tier, reason = _allowed(asked, entrance, tiers)
    named = _name(headers, _FAIRNESS_HEADERS) or body.safety_identifier or body.user or ""
    return Caller(
        request_id=entrance.request_id,
        arrival_s=arrival_s,
        tier=tier,
        tier_asked=asked,
        tenant=named if key is None else key.tenant,
        ttft_target_s=_seconds(headers, _TTFT_HEADERS),
        tpot_target_s=_seconds(headers, _TPOT_HEADERS),
        chain_id=chain_id or None,
        chain_deadline_s=None if deadline_s is None else arrival_s + deadline_s,
        key=key,
        endpoint=entrance.endpoint,
        batch_id=entrance.batch_id,
        reason=reason,
    )


def _allowed(asked: str, entrance: Entrance, tiers: TierSet) -> tuple[str, str | None]:
    """The tier a call gets, and why it is not the one it asked for."""
    if entrance.batch_id is not None:
        lowest = tiers.ordered[-1].name
        return lowest, None if asked == lowest else f"lines of a batch are served as {lowest}"
    tier = clamp(asked, entrance.key, tiers)
    return tier, None if tier == asked else f"this key is served as {tier} at most"


def request_id_of(headers: Headers) -> str:
    """The caller's own `x-request-id` when it is fit to be sent back, else a new one."""
    given = headers.get("x-request-id", "")
    fits = 0 < len(given) <= _MAX_NAME_CHARS and given.isascii() and given.isprintable()
    return given if fits else f"req_{uuid.uuid4().hex}"


def now_s() -> float:
    return time.monotonic()


def _tier(headers: Headers, asked: str | None, tiers: TierSet, default: str) -> str:
    """The body's tier, else a header's, else the default."""
    if asked is not None:
        return tiers.resolve(asked, default).name
    for header in _TIER_HEADERS:
        value = headers.get(header)
        if value is not None:
            return _header_tier(header, value, tiers, default)
    return tiers.resolve(None, default).name


def _header_tier(header: str, value: str, tiers: TierSet, default: str) -> str:
    try:
        return tiers.resolve(value, default).name
    except ApiError as error:
        raise bad_request(f"Header {header}: {error.message}", header) from None


def _name(headers: Headers, names: tuple[str, ...]) -> str | None:
    return next((headers[name] for name in names if headers.get(name)), None)


def _seconds(headers: Headers, names: tuple[str, ...]) -> float | None:
    """A duration that a header gives in milliseconds."""
    header = next((name for name in names if headers.get(name)), None)
    if header is None:
        return None
    try:
        value_ms = float(headers[header])
    except ValueError:
        value_ms = math.nan
    if not 0 < value_ms < math.inf:
        raise bad_request(
            f"Header {header} must be a number of milliseconds above 0, not {headers[header]!r}.",
            header,
        )
    return value_ms / 1000
