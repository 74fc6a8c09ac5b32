"""What one lane can promise: its SLO-safe capacity, out of the cost model.

A lane is planned as steps of one *period* each, the tightest TPOT it has to keep. A step has one
prefill chunk, whose size takes half of what a period leaves beside one decode, and all promised
requests as decodes:

    decodes     a step with every promised request decoding, and a chunk, takes at most a period
    prefills    a prompt is promised if at a chunk a period all promised prompts of its and higher
                tiers, and its own, are through by its TTFT

A higher tier goes before a lower one, and is promised whatever lower ones were: theirs hold unless
more urgent work comes. Lower tiers leave a part of the lane free for those above them.

A prefill lane has no decodes: its steps are as long as a full chunk, and only prompts are promised
room there. A decode lane's steps have no chunk; it promises its part of requests that come to it.

A deadline tier is promised if all work before it and its own would be done in time.

Who comes in a burst and cannot be promised is taken without a promise where it would be a little
late, if its answer keeps everybody's pace (`can_late`).
"""

from __future__ import annotations

from collections.abc import Sequence as List
from math import ceil, inf

from nitsum.cost.protocol import CostModel
from nitsum.plan import Lane
from nitsum.sched.budget import largest_chunk, with_prefill
from nitsum.sched.limits import LaneLimits
from nitsum.sequence import Sequence
from nitsum.step import BatchShape
from nitsum.tier import Tier

PREFILL_PART = 0.5
"""Part of the time a period leaves beside one decode that the chunk may take."""
HEADROOM = 0.25
"""Part of a lane's slots, memory and spare time that tiers below the first leave free."""
PLANNED_CONTEXT = 1024
"""Positions before a chunk, for its price."""
STEPS_UNDER_WAY = 2
"""The engine runs a step ahead: a new request joins the step after next."""
LATE = 4.0
"""Times what is left of its target by which a prompt without a promise must be through to be worth
its tier."""
ONE_DECODE = BatchShape(1, 1, 0, 0, 1)


class _Level:
    """Prompts of one level that are not through yet: the promised ones, or the others."""

    def __init__(self) -> None:
        self.pending: dict[Sequence, float] = {}
        """Seconds of the lane until each is through, on its own."""
        self.backlog_s = 0.0

    def add(self, sequence: Sequence, seconds: float) -> None:
        self.pending[sequence] = seconds
        self.backlog_s += seconds

    def remove(self, sequence: Sequence) -> None:
        seconds = self.pending.pop(sequence, None)
        if seconds is not None:
            self.backlog_s -= seconds
        if not self.pending:
            self.backlog_s = 0.0  # no rounding error stays


class Promises:
    """The promises one lane has given."""

    def __init__(
        self,
        lane: Lane,
        tiers: List[Tier],
        cost: CostModel,
        limits: LaneLimits,
        capacity_tokens: int,
    ) -> None:
        self.cost = cost
        self.limits = limits
        self.capacity_tokens = capacity_tokens
        """KV positions the lane can hold."""
        self.tiers = tuple(tiers)
        self._level_of = {tier.name: level for level, tier in enumerate(tiers)}
        self._levels = [_Level() for _ in tiers]
        self._late = [_Level() for _ in tiers]
        """Taken without a promise."""
        self._held: dict[Sequence, int] = {}
        """Promised requests with a TPOT, and the positions they may come to hold."""
        self.num_tokens = 0
        self._chunk: int | None = None
        self.serve(lane)

    def serve(self, lane: Lane) -> None:
        """The lane has these tiers and this role from now on."""
        served = [tier for tier in self.tiers if lane.serves(tier.name)] or self.tiers
        self.lane = lane
        self.period_s = min((t.tpot_s for t in served if t.tpot_s is not None), default=inf)
        """The tightest TPOT the lane may have to keep."""
        if lane.role == "prefill":
            self.period_s = inf
        self.forget_prices()

    def forget_prices(self) -> None:
        """The cost model has learned: look at it anew."""
        self._chunk = None

    @property
    def num_promised(self) -> int:
        return len(self._held)

    def can(self, tier: Tier, num_prompt: int, num_tokens: int, slack_s: float) -> bool:
        """Whether the lane can promise a request of a TPOT tier: `num_prompt` positions to compute
        within `slack_s`, `num_tokens` to hold in the end."""
        level = self._level_of[tier.name]
        seconds = self.through_s(num_prompt)
        if self._ahead_s(level) + seconds > slack_s:
            return False  # the test that a busy lane fails, and the cheapest
        return self.can_decode(tier, num_tokens)

    def can_late(self, tier: Tier, num_prompt: int, num_tokens: int, slack_s: float) -> bool:
        """Whether a request it cannot promise would be no more than a little late, after the others
        of that kind, and leave promised answers their pace."""
        level = self._level_of[tier.name]
        seconds = self._ahead_s(level) + self.through_s(num_prompt)
        seconds += self._late[level].backlog_s
        return seconds <= LATE * slack_s and self.can_decode(tier, num_tokens)

    def could(self, tier: Tier, num_prompt: int, num_tokens: int, slack_s: float) -> bool:
        """Whether it could if it had promised nothing: if not, load is not what is in the way."""
        return (
            self.could_decode(tier, num_tokens)
            and self._under_way_s() + self.through_s(num_prompt) <= slack_s
        )

    def could_decode(self, tier: Tier, num_tokens: int) -> bool:
        """The same of its part among the decodes."""
        return self._decode_fits(tier, 1, num_tokens, 1.0)

    def add(self, sequence: Sequence, tier: Tier, num_prompt: int, num_tokens: int) -> None:
        """Promise it; `can` was asked."""
        self._levels[self._level_of[tier.name]].add(sequence, self.through_s(num_prompt))
        self.add_decode(sequence, num_tokens)

    def add_late(self, sequence: Sequence, tier: Tier, num_prompt: int, num_tokens: int) -> None:
        """Take it without a promise; `can_late` was asked. Its answer counts as a promised one."""
        self._late[self._level_of[tier.name]].add(sequence, self.through_s(num_prompt))
        self.add_decode(sequence, num_tokens)

    def add_decode(self, sequence: Sequence, num_tokens: int) -> None:
        """Promise only its part in the decodes: its prompt is computed, or is so elsewhere."""
        self._held[sequence] = num_tokens
        self.num_tokens += num_tokens

    def prefilled(self, sequence: Sequence) -> None:
        """Its prompt is through."""
        if sequence in self._held:
            self._forget_prompt(sequence)

    def remove(self, sequence: Sequence) -> None:
        num_tokens = self._held.pop(sequence, None)
        if num_tokens is not None:
            self.num_tokens -= num_tokens
            self._forget_prompt(sequence)

    def _forget_prompt(self, sequence: Sequence) -> None:
        for entry in (*self._levels, *self._late):
            entry.remove(sequence)

    def through_s(self, num_prompt: int) -> float:
        """Seconds of the lane until a prompt is computed, beside decodes."""
        chunk = self._chunk_tokens()
        if not chunk:
            return inf
        if self.period_s == inf:
            return (
                self._chunk_s(num_prompt)
                if num_prompt <= chunk
                else (num_prompt / chunk * self._chunk_s(chunk))
            )
        return ceil(num_prompt / chunk) * self.period_s

    # -- inside --

    def _ahead_s(self, level: int) -> float:
        """Until promised prompts of the level and all of those above it are through."""
        ahead_s = self._under_way_s()
        for entry in (*self._levels[: level + 1], *self._late[:level]):
            ahead_s += entry.backlog_s
        return ahead_s

    def _under_way_s(self) -> float:
        """The steps that run or wait to run when a request arrives."""
        pending = any(entry.pending for entry in (*self._levels, *self._late))
        if self.lane.role == "prefill" and pending:
            return self._chunk_s(self._chunk_tokens())
        return 0.0 if self.period_s == inf else STEPS_UNDER_WAY * self.period_s

    def can_decode(self, tier: Tier, num_tokens: int) -> bool:
        """Whether an answer finds room and keeps its pace among the decodes."""
        part = 1.0 if self._level_of[tier.name] == 0 else 1.0 - HEADROOM
        return self._decode_fits(tier, len(self._held) + 1, self.num_tokens + num_tokens, part)

    def _decode_fits(self, tier: Tier, count: int, num_tokens: int, part: float) -> bool:
        if count > part * self.limits.max_num_seqs or num_tokens > part * self.capacity_tokens:
            return False
        period_s = min(self.period_s, tier.tpot_s or inf)
        if period_s == inf or self.lane.role == "prefill":
            return True
        decodes = BatchShape(count, num_tokens, 0, 0, count)
        chunk = self._chunk_tokens()
        shape = with_prefill(decodes, PLANNED_CONTEXT, chunk, True) if chunk else decodes
        if part < 1.0:
            period_s -= (1.0 - part) * (period_s - self._step_time(ONE_DECODE))
        return self._step_time(shape) <= period_s

    def _chunk_tokens(self) -> int:
        """Tokens of the chunk in each planned step; 0 if the lane cannot keep its period."""
        is_mixed = self.lane.role != "prefill"
        most = self.limits.max_mixed_tokens if is_mixed else self.limits.max_batch_tokens
        if self.lane.role == "decode":
            return 0
        if self.period_s == inf:
            return most
        if self._chunk is None:
            spare_s = self.period_s - self._step_time(ONE_DECODE)
            allowed_s = self.period_s - (1.0 - PREFILL_PART) * spare_s
            self._chunk = largest_chunk(
                self._step_time, ONE_DECODE, PLANNED_CONTEXT, most + 1, most, allowed_s
            )
        return self._chunk

    def _chunk_s(self, num_tokens: int) -> float:
        context = num_tokens * (num_tokens + 1) // 2
        return self._step_time(BatchShape(0, 0, num_tokens, context, 1))

    def _step_time(self, shape: BatchShape) -> float:
        return self.cost.step_time(self.lane, shape)
