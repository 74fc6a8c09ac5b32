"""Cached prefixes that come after a switch's requests, as far as free units allow."""

from __future__ import annotations

from nitsum.control.courier import Courier
from nitsum.control.migration import Lanes
from nitsum.kv.blocks import Block
from nitsum.kv.transfer import Transfer, free_copies
from nitsum.messages import WaveReport
from nitsum.plan import Group, Plan


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
        """One portion, shared out among the lanes: each rank's copies slow its steps down."""
        lanes = [group for group in self._lanes_over(src) if self._room(src, group)]
        if not lanes:
            return False
        portions: dict[Group, list[Block]] = {group: [] for group in lanes}
        for block in self.lanes.kv.prefixes.newest(src, num_blocks):
            portions[lanes[block.root % len(lanes)]].append(block)
        sent = [self._send(src, dst, blocks) for dst, blocks in portions.items()]
        return any(sent)

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

    def _send(self, src: Group, dst: Group, blocks: list[Block]) -> bool:
        """As many of them as there is room for; those that are there already make way."""
        kv = self.lanes.kv
        blocks = blocks[: self._room(src, dst)]
        known = kv.prefixes.in_layout(dst)
        for block in blocks:
            if block.hash in known:
                kv.evict(block)
        fresh = [block for block in blocks if block.hash is not None]
        if fresh:
            transfer = Transfer(kv, src, dst)
            self._num_blocks += transfer.reserve(fresh)
            self.courier.send_final(transfer.copy(len(transfer.blocks)))
            transfer.settle()
            transfer.share()
            self.courier.leave(transfer, keep=False)
            self._units_in_place += transfer.num_in_place
        return bool(blocks)
