"""What a key has left: requests and tokens of this minute, requests at a time, money.

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
from nitsum.server.keyfile import Key

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
    """What one key has used. Limits are read from the key each time: they may change."""

    requests: Meter | None = None
    tokens: Meter | None = None
    num_open: int = 0
    spent: float = 0.0


@dataclass
class Quotas:
    """The accounts of all keys. Money spent before the start comes from `spent_before(key_id)`."""

    clock: Callable[[], float]
    spent_before: Callable[[str], float] = lambda key_id: 0.0
    _accounts: dict[str, Account] = field(default_factory=dict[str, Account])

    def admit(self, key: Key, num_tokens: int) -> None:
        """Take one request with a prompt of `num_tokens`; raises a 429 that says what is used up.

        What was admitted must be given back with `settle`.
        """
        account = self._account(key)
        _check(key, account, num_tokens)
        if account.requests is not None:
            account.requests.left -= 1
        if account.tokens is not None:
            account.tokens.left -= num_tokens
        account.num_open += 1

    def admit_batch(self, key: Key) -> None:
        """A line of a batch: it runs when there is room, so only the budget can refuse it."""
        _check_budget(key, self._account(key))

    def settle(self, key: Key, num_tokens: int) -> None:
        """What `admit` took in has ended; its answer had `num_tokens`."""
        account = self._account(key)
        account.num_open -= 1
        if account.tokens is not None:
            account.tokens.left -= num_tokens

    def spend(self, key: Key, cost: float) -> None:
        """Take money for work that was done."""
        self._account(key).spent += cost

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers for what this key has left."""
        account = self._account(key)
        return {
            **_meter_headers("requests", account.requests),
            **_meter_headers("tokens", account.tokens),
        }

    def _account(self, key: Key) -> Account:
        account = self._accounts.get(key.id)
        if account is None:
            account = self._accounts[key.id] = Account(spent=self.spent_before(key.id))
        now_s = self.clock()
        account.requests = _current(account.requests, key.rpm, now_s)
        account.tokens = _current(account.tokens, key.tpm, now_s)
        return account


def _current(meter: Meter | None, per_minute: int | None, now_s: float) -> Meter | None:
    """The meter, refilled; a new one when the limit changed."""
    if per_minute is None:
        return None
    if meter is None or meter.per_minute != per_minute:
        return Meter(per_minute, per_minute, now_s)
    meter.refill(now_s)
    return meter


def _check(key: Key, account: Account, num_tokens: int) -> None:
    _check_budget(key, account)
    if key.concurrency is not None and account.num_open >= key.concurrency:
        raise ApiError(
            f"This key may have {key.concurrency} requests at a time. Wait for one to end.",
            status=429,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after_s=_CONCURRENCY_RETRY_S,
        )
    if account.requests is not None and account.requests.left < 1:
        raise _used_up(f"{key.rpm} requests a minute", account.requests.wait_s(1))
    if account.tokens is not None and account.tokens.left < num_tokens:
        _check_prompt(account.tokens, num_tokens)
        raise _used_up(f"{key.tpm} tokens a minute", account.tokens.wait_s(num_tokens))


def _check_budget(key: Key, account: Account) -> None:
    if key.budget is not None and account.spent >= key.budget:
        raise _insufficient(f"The budget of this key ({key.budget:g}) is spent. Have it raised.")


def _check_prompt(meter: Meter, num_tokens: int) -> None:
    if num_tokens > meter.per_minute:
        raise _insufficient(
            f"The prompt has {num_tokens} tokens, more than the {meter.per_minute} tokens a minute "
            "of this key. Shorten it or have the limit raised."
        )


def _used_up(limit: str, wait_s: float) -> ApiError:
    return _insufficient(
        f"This key's {limit} are used up; enough is back in {wait_s:.3g} s.", retry_after_s=wait_s
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
