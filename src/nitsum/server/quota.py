"""What a key and its tenant have left: requests and tokens of this minute, places; money.

Requests and tokens refill continuously (a minute's worth in a minute, never more than that at a
time). A prompt's tokens are taken when the call arrives, the answer's when it has ended: its length
is not known before, and reserving the longest one would refuse work that fits. So the account can
be overdrawn by answers under way; the next call waits until the debt is paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from nitsum.errors import ApiError
from nitsum.server.keyfile import Key, Quota

_CONCURRENCY_RETRY_S = 1.0


@dataclass
class Meter:
    """An amount that refills by `per_minute` a minute; negative while overdrawn."""

    per_minute: int
    left: float
    at_s: float

    def refill(self, now_s: float) -> None:
        gained = (now_s - self.at_s) * self.per_minute / 60
        self.left = min(float(self.per_minute), self.left + gained)
        self.at_s = now_s

    def wait_s(self, amount: float) -> float:
        """Until `amount` is there."""
        return max(0.0, (amount - self.left) * 60 / self.per_minute)


@dataclass
class Account:
    """What one key, or all keys of one tenant, have used of their quota."""

    owner: str
    """In the words of an error."""
    quota: Quota = field(default_factory=Quota)
    """Read anew for each call: they may change."""
    requests: Meter | None = None
    tokens: Meter | None = None
    num_open: int = 0

    def refresh(self, quota: Quota, now_s: float) -> None:
        self.quota = quota
        self.requests = _current(self.requests, quota.rpm, now_s)
        self.tokens = _current(self.tokens, quota.tpm, now_s)

    def take(self, num_tokens: int) -> None:
        """One request with a prompt of `num_tokens`."""
        if self.requests is not None:
            self.requests.left -= 1
        self.num_open += 1
        self.take_tokens(num_tokens)

    def take_tokens(self, num_tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.left -= num_tokens


@dataclass
class Quotas:
    """The accounts of all keys and tenants."""

    clock: Callable[[], float]
    spent_before: Callable[[str], float] = lambda key_id: 0.0
    """Money that a key (by id) spent before the start."""
    quota_of: Callable[[str], Quota] = lambda tenant: Quota()
    """What all keys of a tenant may have together."""
    _keys: dict[str, Account] = field(default_factory=dict[str, Account])
    _tenants: dict[str, Account] = field(default_factory=dict[str, Account])
    _spent: dict[str, float] = field(default_factory=dict[str, float])

    def admit(self, key: Key, num_tokens: int) -> None:
        """Take one request with a prompt of `num_tokens`; raises a 429 that says what is used up.

        What was admitted must be given back with `settle`.
        """
        self.check_budget(key)
        accounts = self._accounts(key)
        for account in accounts:
            _check(account, num_tokens)
        for account in accounts:
            account.take(num_tokens)

    def check_budget(self, key: Key) -> None:
        """All that a line of a batch needs: it runs when there is room."""
        if key.budget is not None and self._spent_of(key) >= key.budget:
            raise _insufficient(
                f"The budget of this key ({key.budget:g}) is spent. Have it raised."
            )

    def settle(self, key: Key, num_tokens: int) -> None:
        """What `admit` took in has ended; its answer had `num_tokens`."""
        for account in self._accounts(key):
            account.num_open -= 1
            account.take_tokens(num_tokens)

    def spend(self, key: Key, cost: float) -> None:
        """Take money for work that was done."""
        self._spent[key.id] = self._spent_of(key) + cost

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers: what this key has left, or its tenant if less."""
        accounts = self._accounts(key)
        requests = [account.requests for account in accounts if account.requests is not None]
        tokens = [account.tokens for account in accounts if account.tokens is not None]
        return {
            **_meter_headers("requests", min(requests, key=_left, default=None)),
            **_meter_headers("tokens", min(tokens, key=_left, default=None)),
        }

    def _accounts(self, key: Key) -> tuple[Account, ...]:
        """The key's own and, if it has a tenant, the tenant's, as they stand now."""
        now_s = self.clock()
        own = self._keys.setdefault(key.id, Account("this key"))
        own.refresh(key, now_s)
        if not key.tenant:
            return (own,)
        shared = self._tenants.setdefault(key.tenant, Account(f"tenant {key.tenant!r}"))
        shared.refresh(self.quota_of(key.tenant), now_s)
        return own, shared

    def _spent_of(self, key: Key) -> float:
        if key.id not in self._spent:
            self._spent[key.id] = self.spent_before(key.id)
        return self._spent[key.id]


def _left(meter: Meter) -> float:
    return meter.left


def _current(meter: Meter | None, per_minute: int | None, now_s: float) -> Meter | None:
    """The meter, refilled; a new one when the limit changed."""
    if per_minute is None:
        return None
    if meter is None or meter.per_minute != per_minute:
        return Meter(per_minute, per_minute, now_s)
    meter.refill(now_s)
    return meter


def _check(account: Account, num_tokens: int) -> None:
    """Raise a 429 if the account has no room for one more request."""
    quota, owner = account.quota, account.owner
    if quota.concurrency is not None and account.num_open >= quota.concurrency:
        raise ApiError(
            f"The limit of {owner}, {quota.concurrency} requests at a time, is reached. Wait for "
            "one to end.",
            status=429,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after_s=_CONCURRENCY_RETRY_S,
        )
    if account.requests is not None and account.requests.left < 1:
        raise _used_up(f"{quota.rpm} requests a minute of {owner}", account.requests.wait_s(1))
    if account.tokens is not None and account.tokens.left < num_tokens:
        _check_prompt(account.tokens, num_tokens, owner)
        wait_s = account.tokens.wait_s(num_tokens)
        raise _used_up(f"{quota.tpm} tokens a minute of {owner}", wait_s)


def _check_prompt(meter: Meter, num_tokens: int, owner: str) -> None:
    if num_tokens > meter.per_minute:
        raise _insufficient(
            f"The prompt has {num_tokens} tokens, more than the {meter.per_minute} tokens a minute "
            f"of {owner}. Shorten it or have the limit raised."
        )


def _used_up(limit: str, wait_s: float) -> ApiError:
    return _insufficient(
        f"The {limit} are used up; enough is back in {wait_s:.3g} s.", retry_after_s=wait_s
    )


def _insufficient(message: str, retry_after_s: float | None = None) -> ApiError:
    return ApiError(
        message,
        status=429,
        type="insufficient_quota",
        code="insufficient_quota",
        retry_after_s=retry_after_s,
    )


def _meter_headers(what: str, meter: Meter | None) -> dict[str, str]:
    if meter is None:
        return {}
    return {
        f"x-ratelimit-limit-{what}": str(meter.per_minute),
        f"x-ratelimit-remaining-{what}": str(max(0, math.floor(meter.left))),
        f"x-ratelimit-reset-{what}": _duration(meter.wait_s(meter.per_minute)),
    }


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{int(seconds // 60)}m{int(seconds % 60)}s"
