"""From work items to requests in virtual time, without drawing a single token.

Nobody reads the tokens, so prompts are rows of zeros; which of them are equal is said by hashes
made from what the items say: blocks of a shared segment hash alike, others hash apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import count

import msgspec

from nitsum.metrics.targets import Target, Targets
from nitsum.request import Request
from nitsum.sequence import Sequence
from nitsum.workload.items import Segment, WorkItem

INFINITY = float("inf")


class Feed:
    """What arrives when: the workload's own items, and the later calls of their chains."""

    def __init__(
        self,
        items: Iterable[WorkItem],
        block_tokens: int,
        targets: Targets | None,
        front_door_s: float = 0.0,
    ) -> None:
        self.block_tokens = block_tokens
        self.targets = targets
        """What requests are held to; without any, their tiers say."""
        self.front_door_s = front_door_s
        """From an arrival, from where latencies count, to the engine that hears of it."""
        self.num_submitted = 0
        self.last_arrival_s = 0.0
        self._items: Iterator[WorkItem] = iter(items)
        self._next = next(self._items, None)
        self._later: list[tuple[float, int, WorkItem, list[int]]] = []
        self._calls: dict[str, tuple[WorkItem, Sequence]] = {}
        """Calls under way that others follow."""
        self._tie_breaks = count()
        self.next_s = self._find_next_s()
        """When the engine hears of the next request; infinite when only answers can bring one."""

    def _find_next_s(self) -> float:
        own = self._next.at_s if self._next is not None else INFINITY
        return (min(own, self._later[0][0]) if self._later else own) + self.front_door_s

    def due(self, now: float) -> Iterator[tuple[WorkItem, Request]]:
        """Items that the engine has heard of by `now`, in order of time."""
        while self.next_s <= now:
            item, known = self._pop()
            self.next_s = self._find_next_s()
            self.num_submitted += 1
            self.last_arrival_s = item.at_s
            yield item, self._request(item, known)

    def sent(self, item: WorkItem, sequence: Sequence) -> None:
        """The engine took the item's request."""
        if item.chain is not None and item.call + 1 < len(item.chain.calls):
            self._calls[item.request_id] = item, sequence

    def answered(self, request_id: str, at_s: float) -> None:
        """A request is complete: if its chain goes on, the next call is on its way."""
        call = self._calls.pop(request_id, None)
        if call is None:
            return
        item, sequence = call
        following = item.following(at_s, sequence.tokens, [])
        if following is not None:
            entry = (following.at_s, next(self._tie_breaks), following, sequence.hashes)
            heapq.heappush(self._later, entry)
            self.next_s = self._find_next_s()

    def _pop(self) -> tuple[WorkItem, list[int]]:
        """The next item and the hashes of its leading blocks that are known."""
        own = self._next
        if own is None or (self._later and self._later[0][0] < own.at_s):
            _, _, item, known = heapq.heappop(self._later)
            return item, known
        self._next = next(self._items, None)
        return own, []

    def _request(self, item: WorkItem, known: list[int]) -> Request:
        num_prompt = item.num_prompt
        target = self._target(item, num_prompt)
        return msgspec.structs.replace(
            item.request(0, prompt=[0] * num_prompt),
            prefix_hashes=block_hashes(item, known, self.block_tokens),
            ttft_target_s=target.ttft_s,
            tpot_target_s=target.tpot_s,
        )

    def _target(self, item: WorkItem, num_prompt: int) -> Target:
        return Target() if self.targets is None else self.targets.of(item.tier, num_prompt)


def block_hashes(item: WorkItem, known: list[int], block_tokens: int) -> list[int]:
    """Hashes of the prompt's full blocks; `known` are those of its history's."""
    end = len(item.history)
    hashes = known[: end // block_tokens]
    previous = hashes[-1] if hashes else 0
    for segment in item.segments:
        end += segment.num_tokens
        salt = _salt(segment, previous)
        hashes.extend(range(salt + len(hashes), salt + end // block_tokens))
        previous = salt
    return hashes


def _salt(segment: Segment, previous: int) -> int:
    """64 bits of a segment that follows what `previous` stands for."""
    return (_shared_salt if segment.shared else _any_salt)(segment.key, previous)


def _any_salt(key: str, previous: int) -> int:
    data = previous.to_bytes(16, "little") + key.encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


_shared_salt = lru_cache(maxsize=4096)(_any_salt)
