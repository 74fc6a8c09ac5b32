"""Waiting requests of one tier on one lane: promised ones first, the lost last, tenants in turn.

The order inside a tenant is by latest start, which does not change while a request waits: nothing
is ever sorted again. A request is found to be lost when it would be next, and only then moved
behind those that can still meet their targets. A call of a chain is never lost: late for its own
targets, it keeps the place its chain's deadline gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush, heapreplace
from itertools import count

from nitsum.sched.fairness import Account, Accounts
from nitsum.sequence import Sequence

_Entry = tuple[int, float, int, Sequence]
"""(the client's order, time, ticket, sequence)"""

_PROMISED, _OPEN, _LOST = range(3)
"""Classes of requests in the order in which they are served."""


class _Line:
    """One tenant's requests, by class."""

    __slots__ = ("account", "heaps", "is_listed", "tenant")

    def __init__(self, tenant: str, account: Account) -> None:
        self.tenant = tenant
        self.account = account
        self.heaps: tuple[list[_Entry], ...] = ([], [], [])
        self.is_listed = [False, False, False]


class TierQueue:
    """Adding, removing and looking at the head take O(log n), amortised."""

    def __init__(self, accounts: Accounts, *, fair: bool = True) -> None:
        self.accounts = accounts
        self.fair = fair
        """Otherwise all tenants stand in one line."""
        self.tickets: dict[Sequence, int] = {}
        """Who is here."""
        self._lines: dict[str, _Line] = {}
        self._listed: tuple[list[tuple[float, int, _Line]], ...] = ([], [], [])
        """By class: heap of the lines that have such requests, by service received."""
        self._ids = count()

    def __len__(self) -> int:
        return len(self.tickets)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self.tickets

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.tickets)

    def add(self, sequence: Sequence) -> None:
        line = self._line_of(sequence)
        line.account = self.accounts[line.tenant]
        self.accounts.enter(line.account, sequence.num_prompt)
        ticket = self.tickets[sequence] = next(self._ids)
        entry = (sequence.request.order, sequence.latest_start_s, ticket, sequence)
        self._push(line, _PROMISED if sequence.promised else _OPEN, entry)

    def remove(self, sequence: Sequence) -> bool:
        """False if it is not here. Its heap entry stays until it comes up, or nobody is left."""
        if self.tickets.pop(sequence, None) is None:
            return False
        line = self._line_of(sequence)
        self.accounts.leave(line.account, sequence.num_prompt)
        if not self.tickets:
            self._lines.clear()
            for listed in self._listed:
                listed.clear()
        return True

    def head(self, now: float, *, late: bool = True) -> Sequence | None:
        """Who is next; without `late`, of those that can still meet their targets."""
        found = self._head(_PROMISED, now) or self._head(_OPEN, now)
        return found or (self._head(_LOST, float("-inf")) if late else None)

    # -- inside --

    def _line_of(self, sequence: Sequence) -> _Line:
        tenant = sequence.request.tenant if self.fair else ""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(tenant, self.accounts[tenant])
        return line

    def _push(self, line: _Line, kind: int, entry: _Entry) -> None:
        heappush(line.heaps[kind], entry)
        if not line.is_listed[kind]:
            line.is_listed[kind] = True
            heappush(self._listed[kind], (line.account.served, next(self._ids), line))

    def _head(self, kind: int, now: float) -> Sequence | None:
        listed = self._listed[kind]
        while listed:
            served, entry_id, line = listed[0]
            if not self._settle(line, kind, now):
                heappop(listed)
                line.is_listed[kind] = False
                if not any(line.is_listed):
                    del self._lines[line.tenant]
            elif line.account.served > served:
                heapreplace(listed, (line.account.served, entry_id, line))
            else:
                return line.heaps[kind][0][-1]
        return None

    def _settle(self, line: _Line, kind: int, now: float) -> bool:
        """Bring a request of the class to the front of its heap; False if the line has none."""
        heap = line.heaps[kind]
        while heap:
            order, at_s, ticket, sequence = heap[0]
            if self.tickets.get(sequence) != ticket:
                heappop(heap)
            elif sequence.lost_after_s < now and at_s != sequence.chain_start_s:
                heappop(heap)
                if sequence.chain_start_s is not None:  # late, and its chain need not be
                    heappush(heap, (order, sequence.chain_start_s, ticket, sequence))
                else:
                    self._push(line, _LOST, (order, sequence.request.arrival_s, ticket, sequence))
            else:
                return True
        return False


class ReturnQueue:
    """Requests of one tier that ran before: they keep their place, ahead of new ones."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self.tickets: dict[Sequence, int] = {}
        """Who is here."""
        self._ids = count()

    def __len__(self) -> int:
        return len(self.tickets)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self.tickets)

    def add(self, sequence: Sequence) -> None:
        ticket = self.tickets[sequence] = next(self._ids)
        request = sequence.request
        heappush(self._heap, (request.order, request.arrival_s, ticket, sequence))

    def remove(self, sequence: Sequence) -> bool:
        return self.tickets.pop(sequence, None) is not None

    def head(self) -> Sequence | None:
        heap = self._heap
        while heap and self.tickets.get(heap[0][-1]) != heap[0][-2]:
            heappop(heap)
        return heap[0][-1] if heap else None
