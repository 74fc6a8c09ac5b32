"""What one lane runs next: decodes first, then prefill chunks, by tier and arrival."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from nitsum.kv.cache import KvCache
from nitsum.plan import Lane
from nitsum.request import SeqState, Sequence
from nitsum.sched.limits import LaneLimits
from nitsum.step import Chunk
from nitsum.tier import TierSet


@dataclass
class Composed:
    """A step as decided, and what deciding it did to other sequences."""

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    displaced: list[tuple[Sequence, Sequence]] = field(
        default_factory=list[tuple[Sequence, Sequence]]
    )
    """(paused, in favour of)"""
    resumed: list[Sequence] = field(default_factory=list[Sequence])
    gave_up_kv: list[Sequence] = field(default_factory=list[Sequence])
    """Lost their KV for lack of room; to be queued again."""
    num_free_slots: int = 0


class LaneScheduler:
    """Queues of one lane. `compose()` decides a step; the engine sends it."""

    def __init__(self, lane: Lane, limits: LaneLimits, kv: KvCache, tiers: TierSet) -> None:
        self.lane = lane
        self.limits = limits
        self.kv = kv
        self.tiers = tiers
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []

    # -- coming and going --

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence without KV."""
        sequence.group = self.lane.group
        sequence.state = SeqState.WAITING
        insort(self.waiting, sequence, key=self.urgency)

    def enter(self, sequence: Sequence) -> None:
        """Take over a sequence that holds KV in this lane's layout."""
        sequence.group = self.lane.group
        queue = self.paused if sequence.state is SeqState.PAUSED else self.running
        insort(queue, sequence, key=self.urgency)

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state."""
        for queue in (self.running, self.paused, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
                return

    def take_waiting(self) -> list[Sequence]:
        """Everything that waits without KV, for routing elsewhere."""
        waiting, self.waiting = self.waiting, []
        return waiting

    def urgency(self, sequence: Sequence) -> tuple[int, int, float]:
        """Sort key: tier, the client's order inside it, arrival."""
        request = sequence.request
        return (self.tiers[sequence.tier].level, request.order, request.arrival_s)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.paused)

    def with_kv(self) -> list[Sequence]:
        return sorted(self.running + self.paused, key=self.urgency)

    # -- deciding --

    def compose(self, num_free_slots: int) -> Composed:
        """The next step; without chunks if there is nothing to run.

        `num_free_slots` bounds how many sequences may be admitted: each needs a row on the workers.
        """
        step = Composed(num_free_slots=num_free_slots)
        self._fill_slots(step)
        budget = self._add_decodes(step, self.limits.max_batch_tokens)
        self._add_prefills(step, budget)
        return step

    def _fill_slots(self, step: Composed) -> None:
        """Resume and admit by urgency, displacing strictly lower tiers where slots are full."""
        while (candidate := self._next_candidate()) is not None:
            if len(self.running) >= self.limits.max_num_seqs:
                victim = self.running[-1]
                if self._level(victim) <= self._level(candidate):
                    return
                self._pause(victim, candidate, step)
            if candidate.state is SeqState.PAUSED:
                self._resume(candidate, step)
            elif not self._admit(candidate, step):
                return

    def _next_candidate(self) -> Sequence | None:
        heads = [queue[0] for queue in (self.paused, self.waiting) if queue]
        return min(heads, key=self.urgency) if heads else None

    def _pause(self, victim: Sequence, favoured: Sequence, step: Composed) -> None:
        self.running.remove(victim)
        victim.state = SeqState.PAUSED
        victim.num_displaced += 1
        insort(self.paused, victim, key=self.urgency)
        step.displaced.append((victim, favoured))

    def _resume(self, sequence: Sequence, step: Composed) -> None:
        self.paused.remove(sequence)
        sequence.state = SeqState.RUNNING
        insort(self.running, sequence, key=self.urgency)
        step.resumed.append(sequence)

    def _admit(self, sequence: Sequence, step: Composed) -> bool:
        """Give a waiting sequence KV for its whole prompt; False while there is no room."""
        if not step.num_free_slots:
            return False
        if sequence.num_sampling:
            return False  # a token drawn before it gave up its KV is still on its way
        level = self._level(sequence)
        limit = (len(sequence.tokens) - 1) // self.kv.arena.block_tokens
        request_id = sequence.request_id
        num_cached = self.kv.open(request_id, self.lane.group, sequence.hashes[:limit], level)
        if not self._grow(sequence, len(sequence.tokens), step):
            self.kv.close(request_id)
            return False
        step.num_free_slots -= 1
        sequence.num_cached = num_cached
        sequence.num_dispatched = sequence.num_computed = num_cached
        self.waiting.remove(sequence)
        sequence.state = SeqState.RUNNING
        insort(self.running, sequence, key=self.urgency)
        return True

    def _add_decodes(self, step: Composed, budget: int) -> int:
        for sequence in list(self.running):
            if sequence.num_remaining != 1 or sequence.has_all_samples or not budget:
                continue
            if sequence not in self.running:
                continue  # gave up its KV for one before it
            if not self._grow(sequence, sequence.num_total, step):
                if not self._is_moving(sequence):
                    self._give_up(sequence, step)
                continue
            step.chunks.append(Chunk(sequence, sequence.num_dispatched, 1, True))
            budget -= 1
        return budget

    def _add_prefills(self, step: Composed, budget: int) -> None:
        chosen = {chunk.sequence for chunk in step.chunks}
        for sequence in list(self.running):
            num_left = sequence.num_remaining
            if not budget:
                return
            if num_left < 2 or sequence in chosen or sequence.has_all_samples:
                continue
            num_tokens = min(num_left, budget)
            samples = num_tokens == num_left
            step.chunks.append(Chunk(sequence, sequence.num_dispatched, num_tokens, samples))
            budget -= num_tokens

    def _grow(self, sequence: Sequence, num_tokens: int, step: Composed) -> bool:
        """Room for `num_tokens` positions, taken from less urgent sequences if need be."""
        while not self.kv.grow(sequence.request_id, num_tokens):
            victim = self._memory_victim(sequence)
            if victim is None:
                return False
            self._give_up(victim, step)
        return True

    def _memory_victim(self, sequence: Sequence) -> Sequence | None:
        """The least urgent sequence with KV that ranks behind this one: paused ones go first."""
        for queue in (self.paused, self.running):
            for victim in reversed(queue):
                if self.urgency(victim) <= self.urgency(sequence):
                    break
                if not self._is_moving(victim):
                    return victim
        return None

    def _is_moving(self, sequence: Sequence) -> bool:
        """Peers may be reading its KV: giving it up would free nothing now."""
        table = self.kv.tables[sequence.request_id]
        return any(block.pins for block in table.blocks)

    def _give_up(self, sequence: Sequence, step: Composed) -> None:
        self.leave(sequence)
        self.kv.close(sequence.request_id)
        step.chunks = [chunk for chunk in step.chunks if chunk.sequence is not sequence]
        step.gave_up_kv.append(sequence)

    def _level(self, sequence: Sequence) -> int:
        return self.tiers[sequence.tier].level
