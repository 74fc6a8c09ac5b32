"""One lane's requests, and the decision of its next step.

    waiting    no KV; by tenant and slack, one queue a tier
    returning  ran before, has no slot: KV on the device, in host memory, or to be computed again
    running    has a slot and KV, and is stepped

`compose()` fills the slots, then the step: decodes first, then prefill chunks as slack allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from nitsum.plan import Lane
from nitsum.sched.alarms import Alarms
from nitsum.sched.composed import Composed
from nitsum.sched.decodes import add_decodes
from nitsum.sched.order import PrefillPace
from nitsum.sched.prefills import add_prefills
from nitsum.sched.queue import ReturnQueue, TierQueue
from nitsum.sched.setting import Setting
from nitsum.sched.share import Shares
from nitsum.sched.slots import fill_slots, next_of
from nitsum.sequence import SeqState, Sequence
from nitsum.step import BatchShape

LATELY_S = 60.0
"""A tier that had a request within this time may have another any moment."""


class LaneScheduler:
    """Queues of one lane. `compose()` decides a step; the engine sends it."""

    def __init__(self, lane: Lane, setting: Setting) -> None:
        self.lane = lane
        self.setting = setting
        self.kv, self.limits, self.rules = setting.kv, setting.limits, setting.rules
        self._price = setting.cost.step_time
        self.levels = range(setting.num_levels)
        self.waiting = [
            TierQueue(setting.accounts_of(level), fair=self.rules.fair) for level in self.levels
        ]
        self.returning = [ReturnQueue() for _ in self.levels]
        self._queued = [
            (new.tickets, old.tickets)
            for new, old in zip(self.waiting, self.returning, strict=True)
        ]
        """By level, who is in its queues."""
        self.running: list[dict[Sequence, None]] = [{} for _ in self.levels]
        self.paused: list[dict[Sequence, None]] = [{} for _ in self.levels]
        """Those of `returning` that have KV, on the device or in host memory."""
        self.held: dict[Sequence, None] = {}
        """On their way to another lane: no further step contains them, nobody displaces them."""
        self.num_running = 0
        self.num_promoted = 0
        """Running ones that were promoted."""
        self.waits = Alarms()
        self.shares = Shares(setting.shares(), 2 * self.limits.max_num_seqs)
        self.neighbours: list[LaneScheduler] = []
        """Lanes that share ranks with this one."""
        self.drains = False
        """A switch takes its requests away."""
        self.is_closing = False
        """It is about to take all of them at once: nobody new gets KV here."""
        self.is_new = False
        """A switch opened it, and no step was composed yet: first it steps those who came along, at
        once. Room for others takes time to make."""
        self.is_settling = False
        """After a cut over, while the old layout's KV is being let go: room comes by itself, and
        who needs more than is free waits for it. To search that arena would hold all up."""
        self.end_by_s = inf
        """Prompts in the next step are to let it end by then."""
        self.decode_s = 0.0
        """What the decodes of the last step alone would have taken."""
        self.next_start_s = float("inf")
        """When the lane's next step must start at the latest."""
        self.num_dry = 0
        """Steps in a row in which prefills were ready and none got a token."""
        self.prefill_pace = PrefillPace(setting.num_levels, self._lone_tokens_per_s())
        self.last_came_s = [-inf for _ in self.levels]
        """When each level last had a new request."""
        self.is_stalled = [False for _ in self.levels]
        """Which levels have prompts with a slot that got nothing of the last step."""
        self.ahead_tokens = [0 for _ in self.levels]
        """Prompt tokens with a slot that are still to compute, of each level and those above it."""
        self.step_takes_tokens = float(self.limits.max_mixed_tokens)
        """Prompt tokens a step takes on when there are enough: where more have slots already, what
        is late anyway gets none."""
        self.slack_tokens = 0
        """Prompt tokens for which slack had room when it last was what bounded a step: the next
        search begins there."""
        self.skipped: dict[Sequence, int] = {}
        """Steps in a row that left a loose request out."""

    def _lone_tokens_per_s(self) -> float:
        most = self.limits.max_batch_tokens
        return most / self.setting.estimator.prefill_s(self.lane, most)

    def newcomer_ttft_s(self, now: float) -> float:
        """The tightest time to first token that somebody who comes now may want; infinite if no
        tier with such a target had a request lately."""
        tiers = self.setting.tiers.ordered
        return min(
            (
                tier.ttft_s
                for level, tier in enumerate(tiers)
                if tier.ttft_s is not None and self.last_came_s[level] > now - LATELY_S
            ),
            default=inf,
        )

    # -- coming and going --

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence without KV on the device."""
        sequence.group = self.lane.group
        level = self.setting.level(sequence)
        self.last_came_s[level] = max(self.last_came_s[level], sequence.request.arrival_s)
        if sequence.request_id in self.kv.parked:
            sequence.state = SeqState.PAUSED
            self.paused[level][sequence] = None
            self.returning[level].add(sequence)
        else:
            sequence.state = SeqState.WAITING
            ran_before = sequence.num_restarts > 0
            (self.returning if ran_before else self.waiting)[level].add(sequence)
        self._set_alarm(sequence)
        self.next_start_s = min(self.next_start_s, sequence.latest_start_s)

    def enter(self, sequence: Sequence) -> None:
        """Take over a sequence that holds KV in this lane's layout."""
        sequence.group = self.lane.group
        if sequence.state is SeqState.PAUSED:
            level = self.setting.level(sequence)
            self.paused[level][sequence] = None
            self.returning[level].add(sequence)
            self._set_alarm(sequence)
        else:
            self._run(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state."""
        if sequence in self.held:
            del self.held[sequence]
            return
        level = self.setting.level(sequence)
        if sequence in self.running[level]:
            del self.running[level][sequence]
            self.num_running -= 1
            self.num_promoted -= sequence.promoted
            self.skipped.pop(sequence, None)
            self.waits.cancel(sequence)
            return
        self.paused[level].pop(sequence, None)
        if not self.returning[level].remove(sequence):
            self.waiting[level].remove(sequence)
        self.waits.cancel(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Stop stepping a running sequence that is about to leave."""
        self.leave(sequence)
        self.held[sequence] = None

    def let_go(self, sequence: Sequence) -> None:
        """It stays after all."""
        del self.held[sequence]
        self._run(sequence)

    def take_waiting(self) -> list[Sequence]:
        """Everything without KV on the device, for routing elsewhere."""
        queues: list[ReturnQueue | TierQueue] = [*self.returning, *self.waiting]
        taken = [
            sequence
            for queue in queues
            for sequence in queue
            if sequence.request_id not in self.kv.tables
        ]
        for sequence in taken:
            self.leave(sequence)
        return taken

    @property
    def takes_turns(self) -> bool:
        """A switch takes requests from here into a lane on the same ranks, or the other way: both
        step, so both keep their steps short."""
        return bool(self.neighbours) and any(
            (self.drains or other.drains) and self.num_running and other.num_running
            for other in self.neighbours
        )

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting)) + sum(map(len, self.returning)) - self.num_paused

    @property
    def num_paused(self) -> int:
        return sum(map(len, self.paused))

    @property
    def has_work(self) -> bool:
        return self.num_running > 0 or self.has_queued

    def with_kv(self) -> list[Sequence]:
        """Those that hold KV on the device, most urgent first."""
        tables = self.kv.tables
        held = [s for s in self._with_state() if s.request_id in tables]
        level = self.setting.level
        return sorted(held, key=lambda s: (level(s), s.request.order, s.request.arrival_s))

    def _with_state(self) -> Iterator[Sequence]:
        yield from self.held
        for level in self.levels:
            yield from self.running[level]
            yield from self.paused[level]

    # -- deciding --

    def compose(
        self, num_free_slots: int, now: float, start_s: float | None = None, part: float = 1.0
    ) -> Composed:
        """The next step; without chunks if there is nothing to run.

        `num_free_slots` bounds how many sequences may join: each needs a row on the workers. The
        step will start at `start_s`, when those before it on its ranks have ended. With decodes in
        it, it computes no more than `part` of the tokens it may.
        """
        start_s = now if start_s is None else max(now, start_s)
        step = Composed(len(self.levels), num_free_slots, now, start_s, part)
        self.is_new = self.is_new and self.num_running > 0
        fill_slots(self, step)
        self.is_new = False
        self.is_stalled = [False] * len(self.levels)
        self.ahead_tokens = [0] * len(self.levels)
        prefills = add_decodes(self, step)
        if any(prefills):
            add_prefills(self, step, prefills)
        self._settle(step)
        self._take_turns(step)
        return step

    def has_backlog(self, level: int) -> bool:
        """The level has work without a slot, or with one and no part in the last step."""
        return self.is_stalled[level] or any(self._queued[level])

    @property
    def has_queued(self) -> bool:
        """Somebody has no slot."""
        return any(map(any, self._queued))

    def queued_levels(self) -> list[int]:
        """Levels of which somebody has no slot."""
        return [level for level, (new, old) in enumerate(self._queued) if new or old]

    def shape_time(self, shape: BatchShape) -> float:
        return self._price(self.lane, shape)

    def step_time(self, step: Composed) -> float:
        return self._price(self.lane, step.shape)

    @property
    def num_seats(self) -> int:
        """Decodes one step may contain. A switch can bring more sequences than there are slots:
        then they take turns, and one seat stays free for prompts."""
        most = min(self.limits.max_num_seqs, self.limits.max_mixed_tokens)
        return max(1, most - (self.num_running > self.limits.max_num_seqs))

    def _take_turns(self, step: Composed) -> None:
        """With more sequences than seats, those of this step are the last in the next."""
        if self.num_running > self.limits.max_num_seqs:
            for chunk in step.chunks:
                running = self.running[self.setting.level(chunk.sequence)]
                if chunk.sequence in running:
                    del running[chunk.sequence]
                    running[chunk.sequence] = None

    # -- slots --

    def pause(self, victim: Sequence, favoured: Sequence, step: Composed) -> None:
        """The victim keeps its KV and its place, and loses its slot."""
        level = self.setting.level(victim)
        self.leave(victim)
        victim.state = SeqState.PAUSED
        victim.num_displaced += 1
        victim.wait_from_s = step.now
        self.paused[level][victim] = None
        self.returning[level].add(victim)
        self._set_alarm(victim)
        if level > self.setting.level(favoured) or favoured.promoted:
            step.displaced.append((victim, favoured))

    def put_back(self, sequence: Sequence, step: Composed) -> None:
        """A late prompt with a slot of which nothing was computed waits in its queue again."""
        self.leave(sequence)
        self.kv.close(sequence.request_id)
        self.charge_prompt(sequence, sequence.num_cached - len(sequence.tokens))
        sequence.num_dispatched = sequence.num_computed = sequence.num_cached = 0
        sequence.state = SeqState.WAITING
        self.note_waited(sequence, step.now)
        self.waiting[self.setting.level(sequence)].add(sequence)
        self._set_alarm(sequence)
        step.put_back.append(sequence)

    def start(self, sequence: Sequence, now: float) -> None:
        """It has KV, and gets a slot."""
        level = self.setting.level(sequence)
        if not self.returning[level].remove(sequence):
            self.waiting[level].remove(sequence)
        self.paused[level].pop(sequence, None)
        if not sequence.in_prefill or sequence.promoted:
            self.waits.cancel(sequence)
        self.note_waited(sequence, now)
        self._run(sequence)
        if self.rules.slack and sequence.num_remaining > 1:
            for below in range(level, len(self.levels)):
                self.ahead_tokens[below] += sequence.num_remaining

    def note_waited(self, sequence: Sequence, now: float) -> None:
        sequence.waited_s += max(0.0, now - sequence.wait_from_s)
        sequence.wait_from_s = max(now, sequence.wait_from_s)

    def charge_prompt(self, sequence: Sequence, num_new: int) -> None:
        if self.rules.fair:
            accounts = self.setting.accounts[sequence.tier]
            accounts.charge_prompt(sequence.request.tenant, num_new)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SeqState.RUNNING
        self.running[self.setting.level(sequence)][sequence] = None
        self.num_running += 1
        self.num_promoted += sequence.promoted

    def _set_alarm(self, sequence: Sequence) -> None:
        if self.rules.shares:
            wait_s = self.setting.tiers[sequence.tier].max_wait_s - sequence.waited_s
            self.waits.set(sequence, sequence.wait_from_s + wait_s)

    # -- afterwards --

    def _settle(self, step: Composed) -> None:
        """Keep the books of a composed step."""
        self.shares.note_step(step.tokens, self.has_backlog)
        if self.rules.fair:
            self._charge(step)
        self.next_start_s = step.next_due_s - step.predicted_s
        for level in self.queued_levels():
            head = next_of(self, level, step.now)
            if head is not None:
                self.next_start_s = min(self.next_start_s, head.latest_start_s)

    def _charge(self, step: Composed) -> None:
        accounts = self.setting.accounts
        if not any(account.num_tenants > 1 for account in accounts.values()):
            return
        for sequence, _, _, samples in step.chunks:
            if samples:
                accounts[sequence.tier].charge_token(sequence.request.tenant)
