"""Cached prefixes that come after a switch's requests, as far as free units allow."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from nitsum.control.courier import Courier
from nitsum.control.migration import Lanes
from nitsum.kv.blocks import Block
from nitsum.kv.transfer import Transfer, free_copies
from nitsum.messages import WaveReport
from nitsum.plan import Group, Plan

AHEAD_BLOCKS = 768
"""Looked up at once: sorting them by lane takes a turn a quarter of a millisecond."""


class _Ahead(NamedTuple):
    """Cached blocks by destination, as they were when they were looked up."""

    queues: dict[Group, deque[Block]]
    is_all: bool
    """There were no others."""


class Following:
    """Cached blocks on their way out of emptied lanes, the most valuable first."""

    def __init__(
        self, lanes: Lanes, courier: Courier, *, number: int, sources: list[Group], plan: Plan
    ) -> None:
        """What is cached for the groups of `sources` goes to lanes of `plan` on the same ranks."""
        self.lanes = lanes
        self.courier = courier
        self.number = number
        """It counts as a wave."""
        self.sources = sources
        self.plan = plan
        self.is_over = False
        self._started_s = lanes.now()
        self._bytes_before = courier.bytes_moved
        self._num_blocks = 0
        self._ahead: dict[Group, _Ahead] = {}
        """By source."""
        self._units_in_place = 0

    def advance(self, num_blocks: int) -> bool:
        """Send up to `num_blocks` from each source; False when that is over."""
        sent = [self._follow_from(src, num_blocks) for src in self.sources]
        if any(sent) or not self.courier.is_quiet or self.courier.is_leaving:
            return True
        self.is_over = True
        return False

    def report(self) -> WaveReport:
        return WaveReport(
            num_requests=0,
            num_cached_blocks=self._num_blocks,
            bytes_moved=self.courier.bytes_moved - self._bytes_before,
            units_in_place=self._units_in_place,
            propose_s=0.0,
            precopy_s=self.lanes.now() - self._started_s,
            cutover_s=0.0,
        )

    def _follow_from(self, src: Group, num_blocks: int) -> bool:
        """One portion, shared out among the lanes: each rank's copies slow its steps down. A lane
        that has all it may have before it waits until a portion is worth the turn."""
        kv = self.lanes.kv
        lanes = [group for group in self._lanes_over(src) if free_copies(kv, src, group)]
        open_lanes = [group for group in lanes if self.courier.wants_more(group)]
        if not open_lanes:
            return False
        queues = self._look_ahead(src, lanes, open_lanes, max(num_blocks, AHEAD_BLOCKS))
        if not any(queues[dst] for dst in open_lanes):
            return False
        share = -(-num_blocks // len(open_lanes))
        for dst in open_lanes:
            self._send(src, dst, _take(queues[dst], min(share, self._room(src, dst))))
        return True

    def _look_ahead(
        self, src: Group, lanes: list[Group], wanted: list[Group], num_blocks: int
    ) -> dict[Group, deque[Block]]:
        """What comes next for each lane, a prefix always for the same one unless that has no memory
        left. It is looked up anew when a wanted lane has none and may find some, and when no wanted
        one has any."""
        ahead = self._ahead.get(src)
        if ahead is not None and list(ahead.queues) == lanes:
            found = [bool(ahead.queues[dst]) for dst in wanted]
            if all(found) or (ahead.is_all and any(found)):
                return ahead.queues
        blocks = self.lanes.kv.prefixes.newest(src, num_blocks)
        homes, queues = self._lanes_over(src), {group: deque[Block]() for group in lanes}
        for block in blocks:
            home = homes[block.root % len(homes)]
            queues[home if home in queues else lanes[block.root % len(lanes)]].append(block)
        self._ahead[src] = _Ahead(queues, is_all=len(blocks) < num_blocks)
        return queues

    def _lanes_over(self, src: Group) -> list[Group]:
        """Where requests may find them again: new ones never come to decode lanes."""
        return [
            lane.group
            for lane in self.plan.lanes
            if lane.group.overlaps(src) and lane.role != "decode"
        ]

    def _room(self, src: Group, dst: Group) -> int:
        """Blocks that may be sent there now."""
        kv = self.lanes.kv
        return min(self.courier.room(dst, kv.arena.page_units(dst)), free_copies(kv, src, dst))

    def _send(self, src: Group, dst: Group, blocks: list[Block]) -> None:
        """All of them; those that are there already make way."""
        kv = self.lanes.kv
        known = kv.prefixes.in_layout(dst)
        for block in blocks:
            if block.hash in known:
                kv.evict(block)
        fresh = [block for block in blocks if block.hash is not None]
        if fresh:
            transfer = Transfer(
                kv, src, dst, evicts=False
            )  # who would make way is to follow as well
            self._num_blocks += transfer.reserve(fresh)
            self.courier.send_final(transfer.copy(len(transfer.blocks)))
            transfer.settle()
            transfer.share()
            self.courier.leave(transfer, keep=False)
            self._units_in_place += transfer.num_in_place


def _take(queue: deque[Block], count: int) -> list[Block]:
    """Up to `count` of the first, leaving out those that are gone or in use by now."""
    taken: list[Block] = []
    while queue and len(taken) < count:
        block = queue.popleft()
        if not block.refs and block.hash is not None:
            taken.append(block)
    return taken
