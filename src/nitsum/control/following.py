"""Cached prefixes that come after a switch's requests, as far as free units allow."""

from __future__ import annotations

from collections import deque
from itertools import groupby
from typing import NamedTuple

from nitsum.control.courier import Courier
from nitsum.control.migration import Lanes
from nitsum.kv.blocks import Block
from nitsum.kv.branches import Branch
from nitsum.kv.transfer import Transfer, free_copies
from nitsum.messages import WaveReport
from nitsum.plan import Group, Plan

AHEAD_BLOCKS = 768
"""Looked up at once: sorting them by lane takes a turn a quarter of a millisecond."""

WORTH = 4
"""Prefixes that begin alike go to different lanes if what they have of their own is so many times
as much as the copies of their beginning."""


class _Ahead(NamedTuple):
    """Cached blocks by destination, as they were when they were looked up."""

    queues: dict[Group, deque[Block]]
    common: deque[Block]
    """Those that every lane gets."""
    is_all: bool
    """There were no others."""


class _Family(NamedTuple):
    """What moves together."""

    head: Branch
    num_common: int
    """First blocks of its prefixes that every lane gets: what goes on from there goes anywhere."""


class _Source:
    """What has been decided about the prefixes of one layout."""

    def __init__(self) -> None:
        self.families: dict[Branch, _Family] = {}
        self.homes: dict[Branch, Group] = {}
        """By the head of a family: the lane that its blocks go to."""


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
        self._decided = {group: _Source() for group in sources}
        self._num_sent: dict[Group, int] = {lane.group: 0 for lane in plan.lanes}
        """Blocks that a lane got for itself."""
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
        ahead = self._look_ahead(src, lanes, open_lanes, max(num_blocks, AHEAD_BLOCKS))
        if ahead.common:
            room = min(self._room(src, dst) for dst in lanes)
            while room and ahead.common:
                if self._send_to_all(src, lanes, _take(ahead.common, min(num_blocks, room))):
                    return True
            if ahead.common:
                return False
        if not any(ahead.queues[dst] for dst in open_lanes):
            return False
        share = -(-num_blocks // len(open_lanes))
        for dst in open_lanes:
            blocks = _take(ahead.queues[dst], min(share, self._room(src, dst)))
            self._num_sent[dst] += len(blocks)
            self._send(src, dst, blocks)
        return True

    def _look_ahead(
        self, src: Group, lanes: list[Group], wanted: list[Group], num_blocks: int
    ) -> _Ahead:
        """What comes next for each lane, a prefix always for the same one unless that has no memory
        left. It is looked up anew when a wanted lane has none and may find some, and when no wanted
        one has any."""
        ahead = self._ahead.get(src)
        if ahead is not None and list(ahead.queues) == lanes:
            found = [bool(ahead.queues[dst]) for dst in wanted]
            if ahead.common or all(found) or (ahead.is_all and any(found)):
                return ahead
        blocks = self.lanes.kv.prefixes.newest(src, num_blocks)
        queues = {group: deque[Block]() for group in lanes}
        ahead = _Ahead(queues, deque(), is_all=len(blocks) < num_blocks)
        self._sort(src, blocks, ahead)
        self._ahead[src] = ahead
        return ahead

    def _sort(self, src: Group, blocks: list[Block], ahead: _Ahead) -> None:
        """Into the lanes' queues: a family goes to the lane that has the fewest when it is met."""
        queues, homes = ahead.queues, self._decided[src].homes
        for branch, run in groupby(blocks, key=_branch_of):
            head, num_common = self._family(src, branch)
            own = list(run)
            if num_common:
                ahead.common.extend([block for block in own if block.place < num_common])
                own = [block for block in own if block.place >= num_common]
            if own:
                home = homes.get(head)
                if home is None:
                    home = homes[head] = self._least(queues)
                queues[home if home in queues else self._least(queues)].extend(own)

    def _family(self, src: Group, branch: Branch) -> _Family:
        families = self._decided[src].families
        family = families.get(branch)
        if family is None:
            parent = branch.parent and self._family(src, branch.parent)
            if parent is None or branch.at <= parent.num_common:
                family = _Family(branch, self._num_common(src, branch))
            else:
                family = _Family(parent.head, 0)
            families[branch] = family
        return family

    def _num_common(self, src: Group, branch: Branch) -> int:
        """First blocks of its prefix that are worth a copy in each lane."""
        price = WORTH * (len(self._lanes_over(src)) - 1)
        worth = [at for at, below in branch.forks.items() if below >= price * at]
        return max(worth, default=0) if price else 0

    def _least(self, queues: dict[Group, deque[Block]]) -> Group:
        """The lane that gets the fewest."""
        return min(queues, key=lambda group: self._num_sent[group] + len(queues[group]))

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

    def _send_to_all(self, src: Group, lanes: list[Group], blocks: list[Block]) -> bool:
        """A copy to each of `lanes` that has none. What every lane over the source has then makes
        way; the rest stays for those that have no memory now. Whether anything was sent, or made
        way."""
        prefixes = self.lanes.kv.prefixes
        transfers: list[Transfer] = []
        for dst in lanes:
            known = prefixes.in_layout(dst)
            lacking = [block for block in blocks if block.hash not in known]
            if lacking:
                transfers.append(self._copy(src, dst, lacking))
        found = [prefixes.in_layout(dst) for dst in self._lanes_over(src)]
        whole = [block for block in blocks if all(block.hash in known for known in found)]
        keep = len(whole) < len(blocks)
        num_sent = sum(self._leave(transfer, keep=keep) for transfer in transfers)
        unused = [block for block in whole if not block.refs]
        for block in unused:
            self.lanes.kv.evict(block)
        return bool(num_sent or unused)

    def _send(self, src: Group, dst: Group, blocks: list[Block]) -> None:
        """All of them; those that are there already make way."""
        kv = self.lanes.kv
        known = kv.prefixes.in_layout(dst)
        for block in blocks:
            if block.hash in known:
                kv.evict(block)
        fresh = [block for block in blocks if block.hash is not None]
        if fresh:
            self._leave(self._copy(src, dst, fresh), keep=False)

    def _copy(self, src: Group, dst: Group, blocks: list[Block]) -> Transfer:
        """Copies, as far as there is free memory: the lane has them from now on."""
        # who made way would have followed, too
        transfer = Transfer(self.lanes.kv, src, dst, evicts=False)
        transfer.reserve(blocks)
        self.courier.send_final(transfer.copy(len(transfer.blocks)))
        transfer.settle()
        transfer.share()
        return transfer

    def _leave(self, transfer: Transfer, *, keep: bool) -> int:
        """Let go of the sources when they have been copied; how many. With `keep` they stay
        cached."""
        num_blocks = len(transfer.sources)
        self._num_blocks += num_blocks
        self._units_in_place += transfer.num_in_place
        self.courier.leave(transfer, keep=keep)
        return num_blocks


def _branch_of(block: Block) -> Branch:
    assert block.branch is not None, "a block without users is cached"
    return block.branch


def _take(queue: deque[Block], count: int) -> list[Block]:
    """Up to `count` of the first, leaving out those that are gone or in use by now."""
    taken: list[Block] = []
    while queue and len(taken) < count:
        block = queue.popleft()
        if not block.refs and block.hash is not None:
            taken.append(block)
    return taken
