"""Waiting requests of one tier on one lane: tenants in turn, least slack first, the lost last.

The order inside a tenant is by latest start, which does not change while a request waits: nothing
is ever sorted again. A request is found to be lost when it would be next, and only then moved
behind those that can still meet their targets.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from itertools import count

from nitsum.request import Sequence
from nitsum.sched.fairness import Account, Accounts

_Entry = tuple[int, float, int, Sequence]
"""(the client's order, time, ticket, sequence)"""


class _Line:
    """One tenant's requests."""

    __slots__ = ("account", "late", "listed_late", "listed_ready", "ready")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.ready: list[_Entry] = []
        self.late: list[_Entry] = []
        self.listed_ready = False
        self.listed_late = False


class TierQueue:
    """Adding, removing and looking at the head take O(log n), amortised."""

    def __init__(self, accounts: Accounts, *, fair: bool = True) -> None:
        self.accounts = accounts
        self.fair = fair
        """Otherwise all tenants stand in one line."""
        self._tickets: dict[Sequence, int] = {}
        self._lines: dict[str, _Line] = {}
        self._ready: list[tuple[float, int, _Line]] = []
        """Heap of lines with requests that can make it, by service received."""
        self._late: list[tuple[float, int, _Line]] = []
        self._ids = count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._tickets

    def __iter__(self):
        return iter(self._tickets)

    def add(self, sequence: Sequence) -> None:
        line = self._line_of(sequence)
        self.accounts.enter(line.account, sequence.num_prompt)
        ticket = self._tickets[sequence] = next(self._ids)
        heappush(line.ready, (sequence.request.order, sequence.latest_start_s, ticket, sequence))
        self._list_ready(line)

    def remove(self, sequence: Sequence) -> bool:
        """False if it is not here. Its heap entry stays until it comes up."""
        if self._tickets.pop(sequence, None) is None:
            return False
        line = self._line_of(sequence)
        self.accounts.leave(line.account, sequence.num_prompt)
        return True

    def head(self, now: float) -> Sequence | None:
        """Who is next."""
        return self._head_ready(now) or self._head_late()

    # -- inside --

    def _line_of(self, sequence: Sequence) -> _Line:
        tenant = sequence.request.tenant if self.fair else ""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(self.accounts[tenant])
        return line

    def _list_ready(self, line: _Line) -> None:
        if not line.listed_ready:
            line.listed_ready = True
            heappush(self._ready, (line.account.served, next(self._ids), line))

    def _list_late(self, line: _Line) -> None:
        if not line.listed_late:
            line.listed_late = True
            heappush(self._late, (line.account.served, next(self._ids), line))

    def _head_ready(self, now: float) -> Sequence | None:
        heap = self._ready
        while heap:
            served, entry_id, line = heap[0]
            if not self._settle(line, now):
                heappop(heap)
                line.listed_ready = False
            elif line.account.served > served:
                heapreplace(heap, (line.account.served, entry_id, line))
            else:
                return line.ready[0][-1]
        return None

    def _settle(self, line: _Line, now: float) -> bool:
        """Bring a request that can make it to the front; False if the line has none."""
        ready = line.ready
        while ready:
            order, _, ticket, sequence = ready[0]
            if self._tickets.get(sequence) != ticket:
                heappop(ready)
            elif sequence.lost_after_s < now:
                heappop(ready)
                heappush(line.late, (order, sequence.request.arrival_s, ticket, sequence))
                self._list_late(line)
            else:
                return True
        return False

    def _head_late(self) -> Sequence | None:
        heap = self._late
        while heap:
            served, entry_id, line = heap[0]
            late = line.late
            while late and self._tickets.get(late[0][-1]) != late[0][-2]:
                heappop(late)
            if not late:
                heappop(heap)
                line.listed_late = False
            elif line.account.served > served:
                heapreplace(heap, (line.account.served, entry_id, line))
            else:
                return late[0][-1]
        return None


class ReturnQueue:
    """Requests of one tier that ran before: they keep their place, ahead of new ones."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._tickets: dict[Sequence, int] = {}
        self._ids = count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self):
        return iter(self._tickets)

    def add(self, sequence: Sequence) -> None:
        ticket = self._tickets[sequence] = next(self._ids)
        request = sequence.request
        heappush(self._heap, (request.order, request.arrival_s, ticket, sequence))

    def remove(self, sequence: Sequence) -> bool:
        return self._tickets.pop(sequence, None) is not None

    def head(self) -> Sequence | None:
        heap = self._heap
        while heap and self._tickets.get(heap[0][-1]) != heap[0][-2]:
            heappop(heap)
        return heap[0][-1] if heap else None
