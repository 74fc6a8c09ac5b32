"""A wave of a switch being put together, turn by turn, until it is time to cut it over.

Requests of the lanes to be emptied are taken in, the most urgent first, each with the lane of the
new plan that suits it best and has room. A wave closes when little is left to copy, when that has
not become so for long, or when those that go on in the old lanes would lack room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from nitsum.control.migration import Lanes, SequenceMove, Wave
from nitsum.kv.transfer import stays_home
from nitsum.plan import Group, Lane, Plan
from nitsum.sequence import Sequence


class FillingLanes(Lanes, Protocol):
    """What filling a wave needs of the engine beyond what the wave needs."""

    def sequences_on(self, group: Group) -> list[Sequence]:
        """Those that hold KV in the group's layout, most urgent first."""
        ...

    def load(self, group: Group) -> int:
        """Positions that the lane's sequences hold or wait to compute."""
        ...

    @property
    def last_sent(self) -> int:
        """Number of the newest step."""
        ...


PATIENCE_STEPS = 8
"""Steps that a filled wave waits, at most, for prompts under way to become part of it cheaply."""
REQUESTS_PER_SPARE_BLOCK = 4
"""A fill ends early when less than a block for so many requests is free for them to go on."""
HOME_REQUESTS = 2
"""Requests like it by which a lane may be ahead of the idlest and be chosen all the same, because
the request's pages can grow in place there."""
TAIL_BLOCKS = 2
"""Blocks a request may have left to copy at the cut-over: one being written, one just full."""


class Filling:
    """A wave being put together."""

    def __init__(
        self,
        lanes: FillingLanes,
        wave: Wave,
        *,
        number: int,
        waiting: Iterable[Sequence],
        sources: list[Group],
        plan: Plan,
        stuck: set[str],
    ) -> None:
        """`sources` are the groups to be emptied into the lanes of `plan`. `stuck` is kept up to
        date: requests that could not be moved when it was tried last."""
        self.lanes = lanes
        self.wave = wave
        self.number = number
        self.sources = sources
        self.plan = plan
        self.stuck = stuck
        self.waiting = deque(waiting)
        """Requests not looked at yet."""
        self.num_tried: dict[Sequence, int] = {}
        """Destinations that had no room for a request after all."""
        self.refused: set[Sequence] = set()
        """Those that fit nowhere in this wave."""
        self.full_since: int | None = None
        """Number of the newest step when everything was reserved for the first time."""
        self.is_closing = False
        """Nothing more is pre-copied: cut over when all that is under way has arrived."""

    def advance(self, num_blocks: int) -> None:
        """Reserve and pre-copy up to `num_blocks`, and see whether to close."""
        wave = self.wave
        is_full = self._fill(num_blocks)
        wave.flush()
        if self._is_short_of_room():
            self._stop()
        elif is_full:
            if self.full_since is None:
                self.full_since = self.lanes.last_sent
                wave.times.filled_s = self.lanes.now()
            num_steps = self.lanes.last_sent - self.full_since
            self.is_closing = num_steps >= PATIENCE_STEPS or self._is_worth_closing()

    def add_late(self, num_blocks: int) -> None:
        """Take along who came since: left behind, a request would keep its old lane going."""
        wave, left = self.wave, num_blocks
        while left > 0 and (move := self._add_next()) is not None:
            left -= wave.num_lacking(move)
            if left < 0:
                wave.drop(move.sequence)

    # -- taking requests in --

    def _fill(self, num_blocks: int) -> bool:
        """True when all that fits is reserved, and on its way as far as it is final."""
        wave, left = self.wave, num_blocks
        for move in list(wave.moves.values()):
            left -= self._reserve(move, left)
        most = len(self.plan.lanes)  # destinations can take copies side by side
        while left > 0 and sum(not wave.is_filled(m) for m in wave.moves.values()) < most:
            move = self._add_next()
            if move is None:
                break
            left -= self._reserve(move, left)
        is_full = not self.waiting and all(map(wave.is_filled, wave.moves.values()))
        return is_full and not self._newcomers()

    def _reserve(self, move: SequenceMove, num_blocks: int) -> int:
        count = self.wave.fill(move, num_blocks)
        if move.transfer.is_searching:
            return num_blocks  # a search is all that a turn has time for
        if count is not None:
            return count
        sequence = move.sequence
        self.wave.drop(sequence)
        self.num_tried[sequence] = self.num_tried.get(sequence, 0) + 1
        self.waiting.appendleft(sequence)
        return 1  # so that a turn ends

    def _add_next(self) -> SequenceMove | None:
        """The next request that is likely to fit becomes part of the wave."""
        wave, waiting = self.wave, self.waiting
        if not waiting:
            waiting.extend(self._newcomers())
        while waiting:
            sequence = waiting.popleft()
            if sequence.request_id not in self.lanes.kv.tables or sequence.is_finished:
                continue  # it ended, or gave up its KV, meanwhile
            first = self.num_tried.get(sequence, 0)
            for dst in self._destinations(sequence)[first:]:
                if not wave.fits(sequence, dst, len(waiting)):
                    continue
                if (move := wave.add(sequence, dst)) is not None:
                    self.stuck.discard(sequence.request_id)
                    return move
            self.refused.add(sequence)
            self.stuck.add(sequence.request_id)
        return None

    def _newcomers(self) -> list[Sequence]:
        """Those that have KV in lanes to be emptied, and are neither in the wave nor refused."""
        return [
            sequence
            for group in self.sources
            for sequence in self.lanes.sequences_on(group)
            if sequence.request_id not in self.wave.moves and sequence not in self.refused
        ]

    def _destinations(self, sequence: Sequence) -> list[Group]:
        """Lanes of the new plan by preference: made for what it needs next, serving its tier, idle,
        near. Lanes about as idle as the idlest are equal if its KV can stay where it is."""
        plan, src = self.plan, sequence.group
        assert src is not None
        unfit = "decode" if sequence.num_remaining > 1 else "prefill"
        load = {lane.group: self.lanes.load(lane.group) for lane in plan.lanes}
        for move in self.wave.moves.values():
            load[move.dst] += move.sequence.num_total

        kv = self.lanes.kv
        blocks = kv.tables[sequence.request_id].blocks
        least = min(load[lane.group] / lane.degree for lane in plan.lanes)
        most = least + HOME_REQUESTS * sequence.num_total

        def preference(lane: Lane) -> tuple[bool, bool, float, bool]:
            load_of = load[lane.group] / lane.degree
            is_home = load_of <= most and stays_home(kv, blocks, lane.group)
            return (
                lane.role == unfit,
                not lane.serves(sequence.tier),
                least if is_home else load_of,
                not (is_home or lane.group.overlaps(src)),
            )

        return [lane.group for lane in sorted(plan.lanes, key=preference)]

    # -- closing --

    def _is_short_of_room(self) -> bool:
        """Whether those that go on in the old lanes may soon lack a block."""
        num_requests = len(self.wave.moves) + len(self.waiting) + len(self.refused)
        count = max(1, num_requests // REQUESTS_PER_SPARE_BLOCK)
        kv = self.lanes.kv
        is_short = any(kv.free_blocks(group) < count for group in self.sources)
        return is_short and bool(self.wave.moves)

    def _stop(self) -> None:
        """Cut over what is complete, which gives room back. A request alone goes on until it is."""
        wave = self.wave
        incomplete = [move for move in wave.moves.values() if wave.num_lacking(move)]
        if len(incomplete) == 1 == len(wave.moves):
            return
        for move in incomplete:
            wave.drop(move.sequence)
        self.is_closing = True

    def _is_worth_closing(self) -> bool:
        """Whether what would be left to copy is small."""
        wave = self.wave
        num_left = sum(map(wave.num_left, wave.moves.values()))
        return num_left <= TAIL_BLOCKS * (len(wave.moves) + 1)
