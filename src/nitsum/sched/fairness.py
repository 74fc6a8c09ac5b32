"""Fairness between the tenants of one tier: virtual token counters.

Each tenant has a counter of the service it received, prompt tokens and answer tokens weighted. The
waiting tenant with the smallest counter is served next. A tenant that comes back after a pause is
lifted to the smallest counter of those that wait, so idleness earns no credit. For two tenants that
both wait throughout, the difference in service then stays within 2 max(w_p L, w_q M), with L the
longest prompt and M the tokens a running batch can hold (Sheng et al., "Fairness in serving large
language models", OSDI 2024, theorem 4.4).
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from itertools import count

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
"""An answer token costs about as much as two prompt tokens; the weights the paper uses."""

_FORGET_ABOVE = 4096
"""Tenants remembered before those that no longer matter are dropped."""


class Account:
    """One tenant's service in one tier."""

    __slots__ = ("num_waiting", "served", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.served = 0.0
        """Weighted tokens."""
        self.num_waiting = 0


class _ByTenant(dict[str, Account]):
    """Who is not known yet has an account from the first look."""

    def __missing__(self, tenant: str) -> Account:
        account = self[tenant] = Account(tenant)
        return account


class Accounts:
    """All tenants of one tier, over all lanes."""

    def __init__(self) -> None:
        self._accounts = _ByTenant()
        self._waiting: list[tuple[float, int, Account]] = []
        """Heap of tenants with waiting requests; keys may be too small, never too large."""
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        """What waits in this tier, over all tenants and lanes."""
        self._last_served = 0.0
        self._most_accounts = _FORGET_ABOVE
        self._ids = count()

    def __getitem__(self, tenant: str) -> Account:
        return self._accounts[tenant]

    def forget_waiting(self) -> None:
        """All queues are gone; what was served is not."""
        for account in self._accounts.values():
            account.num_waiting = 0
        self._waiting.clear()
        self.num_waiting = self.num_waiting_tokens = 0

    def enter(self, account: Account, num_tokens: int) -> None:
        """One more request of the tenant waits."""
        self.num_waiting += 1
        self.num_waiting_tokens += num_tokens
        if not account.num_waiting:
            least = self._least()
            account.served = max(account.served, self._last_served if least is None else least)
            heappush(self._waiting, (account.served, next(self._ids), account))
        account.num_waiting += 1

    def leave(self, account: Account, num_tokens: int) -> None:
        """One of them waits no longer."""
        self.num_waiting -= 1
        self.num_waiting_tokens -= num_tokens
        account.num_waiting -= 1
        if not account.num_waiting:
            self._last_served = account.served
            if len(self._accounts) > self._most_accounts:
                self._forget_idle()

    def charge_prompt(self, tenant: str, num_tokens: int) -> None:
        self[tenant].served += PROMPT_WEIGHT * num_tokens

    def charge_token(self, tenant: str) -> None:
        """A token of an answer."""
        self._accounts[tenant].served += ANSWER_WEIGHT

    @property
    def num_tenants(self) -> int:
        return len(self._accounts)

    def _forget_idle(self) -> None:
        """Drop who does not wait and had no more service than those that do: coming back, a tenant
        would be lifted past it anyway."""
        least = self._least()
        floor = self._last_served if least is None else least
        self._accounts = _ByTenant(
            (tenant, account)
            for tenant, account in self._accounts.items()
            if account.num_waiting or account.served > floor
        )
        self._most_accounts = max(_FORGET_ABOVE, 2 * len(self._accounts))

    def _least(self) -> float | None:
        heap = self._waiting
        while heap:
            key, entry_id, account = heap[0]
            if not account.num_waiting:
                heappop(heap)
            elif account.served > key:
                heapreplace(heap, (account.served, entry_id, account))
            else:
                return key
        return None
