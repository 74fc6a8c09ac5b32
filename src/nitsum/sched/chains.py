"""Agent chains: calls that belong together, with one deadline and one growing prefix.

A chain's later calls inherit what slack remains of its deadline, so they rise in order by
themselves. Its prefix stays cached between calls, evicted after everything else, until no call has
come for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush

from nitsum.kv.prefix import PrefixIndex
from nitsum.request import Request
from nitsum.sequence import Sequence


@dataclass
class _Chain:
    deadline_s: float | None = None
    live: set[str] = field(default_factory=set[str])
    """Calls under way."""
    hashes: tuple[int, ...] = ()
    """Blocks kept for its next call."""
    expires_s: float = float("inf")


class ChainBook:
    """The chains of one engine; outlives worker generations, whose caches it is told about."""

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self._chains: dict[str, _Chain] = {}
        self._expiries: list[tuple[float, str]] = []
        self._prefixes: PrefixIndex | None = None

    def __len__(self) -> int:
        return len(self._chains)

    def use(self, prefixes: PrefixIndex) -> None:
        """Keep blocks in this cache from now on."""
        self._prefixes = prefixes
        for chain in self._chains.values():
            prefixes.keep(chain.hashes)

    def begin(self, request: Request) -> None:
        """A call of a chain has arrived."""
        if request.chain_id is None:
            return
        chain = self._chains.setdefault(request.chain_id, _Chain())
        chain.live.add(request.request_id)
        chain.expires_s = float("inf")
        if request.chain_deadline_s is not None:
            named = (request.chain_deadline_s, chain.deadline_s)
            chain.deadline_s = min(value for value in named if value is not None)

    def deadline_s(self, request: Request) -> float | None:
        """When the call's chain should be complete, as its calls said so far."""
        chain = None if request.chain_id is None else self._chains.get(request.chain_id)
        return request.chain_deadline_s if chain is None else chain.deadline_s

    def end(self, sequence: Sequence, now: float) -> None:
        """The call ended: keep what it computed for the next one. Call before its KV is let go."""
        request = sequence.request
        chain = None if request.chain_id is None else self._chains.get(request.chain_id)
        if chain is None or request.chain_id is None:
            return
        chain.live.discard(request.request_id)
        self._keep(chain, tuple(sequence.hashes))
        if not chain.live:
            chain.expires_s = now + self.idle_s
            heappush(self._expiries, (chain.expires_s, request.chain_id))

    def expire(self, now: float) -> None:
        """Let go of chains that have been idle for too long."""
        while self._expiries and self._expiries[0][0] <= now:
            at_s, chain_id = heappop(self._expiries)
            chain = self._chains.get(chain_id)
            if chain is not None and chain.expires_s == at_s:
                self._keep(chain, ())
                del self._chains[chain_id]

    def _keep(self, chain: _Chain, hashes: tuple[int, ...]) -> None:
        if self._prefixes is not None:
            self._prefixes.keep(hashes)
            self._prefixes.unkeep(chain.hashes)
        chain.hashes = hashes
