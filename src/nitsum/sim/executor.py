"""Ranks that only pass the time: an `Executor` in virtual time.

Every rank obeys its FIFO in order. A step starts once all ranks of its lane have come to it, and
lasts what the cost model says; a move starts once its rank and what it waits for are done. All
that a message waits for was sent before it, so its end is known at the moment it is sent:

    rank 0   | step 1 (TP2) | step 3 (TP1) |
    rank 1   | step 1 (TP2) |    step 2 (TP1)    | move, after (rank 0, 2) |

On a CPU, moves take their turn between steps. With `copies_beside`, as on a GPU, copies that do not
end a transaction run beside later steps, which take a little longer meanwhile:

    rank 1   | step 2 |   step 3   | step 4 |
                 | move                | done, what names it goes on
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterable
from itertools import count, repeat

from nitsum.clock import VirtualClock
from nitsum.cost.protocol import CostModel
from nitsum.kv.cache import ArenaShape
from nitsum.messages import (
    FromWorker,
    Move,
    MoveDone,
    Pull,
    Ready,
    Step,
    StepDone,
    StepsTimed,
    ToWorker,
    Work,
)
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape, RankTime, RankTimes

HOST_LATENCY_S = 200e-6
"""From the end of a step to its tokens in the engine: one message between processes."""
BESIDE_COPIES = 0.04
"""What a step takes longer beside copies to its ranks: 0.7 ms of 18 on two H100
(docs/performance.md). A rank pulls: its multiprocessors make the copies, and its memory takes
them. The rank that is read from gives a link's part of its memory's bandwidth, and its steps were
as long as ever: 17 ms, beside 24 to 33 of the one that all copies went to."""


class SimExecutor:
    """Carries messages to ranks that exist as one number each: when they will be done."""

    def __init__(
        self,
        arena: ArenaShape,
        cost: CostModel,
        clock: VirtualClock,
        *,
        host_latency_s: float = HOST_LATENCY_S,
        noise: float = 0.0,
        seed: int = 0,
        copies_beside: bool = False,
    ) -> None:
        self.arena = arena
        self.cost = cost
        self.clock = clock
        self.host_latency_s = host_latency_s
        self.noise = noise
        """Steps last up to this share more or less than predicted, evenly spread."""
        self.copies_beside = copies_beside
        self._random = random.Random(seed)
        self._lanes: dict[Group, Lane] = {}
        self.start()

    # -- the protocol --

    def start(self) -> list[Ready]:
        ranks = range(self.arena.num_ranks)
        now = self.clock.now()
        self._done_s = [array("d") for _ in ranks]
        """Per rank, when each message sent to it is done."""
        self._free_s = [now for _ in ranks]
        self._copied_s = [now for _ in ranks]
        """Per rank, when the copies beside its steps are done."""
        self.busy_s = [0.0 for _ in ranks]
        """Per rank, time in steps and moves, waiting for peers not counted."""
        self._times = [RankTimes() for _ in ranks]
        self._replies: list[tuple[float, int, FromWorker]] = []
        self._tie_breaks = count()
        return [Ready(rank, self.arena.num_units, {}, {}) for rank in ranks]

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        ranks = tuple(ranks)
        if isinstance(message, Step):
            self._run_step(ranks, message)
        elif isinstance(message, Move):
            for rank in ranks:
                self._run_move(rank, message)

    def num_sent(self, rank: int) -> int:
        return len(self._done_s[rank])

    def poll(self, timeout_s: float) -> list[FromWorker]:
        now, replies = self.clock.now(), self._replies
        found: list[FromWorker] = []
        while replies and replies[0][0] <= now:
            found.append(heapq.heappop(replies)[2])
        return found

    def close(self) -> None:
        pass

    # -- time --

    def stand_still(self, seconds: float) -> None:
        """No rank starts anything else for so long after what it has now."""
        now = self.clock.now()
        self._free_s = [max(now, free_s) + seconds for free_s in self._free_s]

    @property
    def next_reply_s(self) -> float:
        """When the next reply will be here; infinite while nothing is under way."""
        return self._replies[0][0] if self._replies else float("inf")

    def _run_step(self, ranks: tuple[int, ...], step: Step) -> None:
        now, free_s = self.clock.now(), self._free_s
        start_s = max(now, *[free_s[rank] for rank in ranks])
        shape = work_shape(step.work)
        lasts_s = self.cost.step_time(self._lane(step.group), shape)
        if self.noise:
            lasts_s *= 1.0 + self._random.uniform(-self.noise, self.noise)
        beside_s = max(self._copied_s[rank] for rank in ranks) - start_s
        if beside_s > 0.0:
            lasts_s += BESIDE_COPIES * min(lasts_s, beside_s)
        end_s = start_s + lasts_s
        leader, *others = [
            RankTime(step.step_id, end_s - from_s, start_s - from_s)
            for from_s in [max(now, free_s[rank]) for rank in ranks]
        ]
        for rank in ranks:
            self._finish(rank, end_s, lasts_s)
        tokens = list(repeat(0, shape.num_samples))
        done = StepDone(step.step_id, ranks[0], tokens, leader.seconds, waited_s=leader.waited_s)
        self._reply(end_s, done)
        for rank, time in zip(ranks[1:], others, strict=True):
            if told := self._times[rank].add(time):
                self._reply(end_s, StepsTimed(rank, told))

    def _run_move(self, rank: int, move: Move) -> None:
        start_s = max(self.clock.now(), self._free_s[rank])
        for source, number in move.after:
            if number:
                start_s = max(start_s, self._done_s[source][number - 1])
        num_bytes = self._bytes_of(move.pulls)
        lasts_s = self.cost.move_time(num_bytes) if num_bytes else 0.0
        host_bytes = self._bytes_of(move.saves) + self._bytes_of(move.loads)
        if host_bytes:
            lasts_s += self.cost.offload_time(host_bytes)
        if self.copies_beside and num_bytes and not move.rows:
            end_s = self._copied_s[rank] = max(start_s, self._copied_s[rank]) + lasts_s
            self._done_s[rank].append(end_s)
        else:
            end_s = start_s + lasts_s
            self._finish(rank, end_s, lasts_s)
        self._reply(end_s, MoveDone(move.move_id, rank, lasts_s, num_bytes))

    def _bytes_of(self, pulls: list[Pull]) -> int:
        return sum(len(pull.dst_units) for pull in pulls) * self.arena.unit_bytes

    def _finish(self, rank: int, end_s: float, lasts_s: float) -> None:
        self._free_s[rank] = end_s
        self._done_s[rank].append(end_s)
        self.busy_s[rank] += lasts_s

    def _reply(self, end_s: float, reply: FromWorker) -> None:
        entry = (end_s + self.host_latency_s, next(self._tie_breaks), reply)
        heapq.heappush(self._replies, entry)

    def _lane(self, group: Group) -> Lane:
        lane = self._lanes.get(group)
        if lane is None:
            lane = self._lanes[group] = Lane(group)
        return lane


def work_shape(work: list[Work]) -> BatchShape:
    """The shape of a step as a worker sees it; see `step.batch_shape`."""
    num_decode = decode_context = prefill = prefill_context = num_samples = 0
    for entry in work:
        n = entry.num_tokens
        if entry.samples:
            num_samples += 1
            if n == 1:
                num_decode += 1
                decode_context += entry.start + 1
                continue
        prefill += n
        prefill_context += n * entry.start + n * (n + 1) // 2
    return BatchShape(num_decode, decode_context, prefill, prefill_context, num_samples)
