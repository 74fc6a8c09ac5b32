"""Where a request goes and what it is promised, or why it cannot come in.

bounded queues      by requests and by tokens of its tier, for every policy
promise             some lane can keep the tier's targets for it
over capacity       what its tier says: downgrade, queue as best effort, refuse
route               a lane that can promise it, with the least work before it; among equals the
                    one that has its prefix
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import NamedTuple

from nitsum.errors import ApiError
from nitsum.plan import Group, Lane, Plan
from nitsum.request import Sequence
from nitsum.sched.estimate import Work
from nitsum.sched.load import LoadBook
from nitsum.sched.promise import Promises
from nitsum.sched.queue import TierQueue
from nitsum.sched.setting import Setting
from nitsum.tier import Tier

OVER_CAPACITY = "over_capacity"


class Route(NamedTuple):
    """A lane, and what the request will be there."""

    lane: Lane
    work: Work
    promised: bool


class _Offer(NamedTuple):
    """One lane as seen by one request; compares by promise, work before it, then prefix."""

    lane: Lane
    work: Work
    num_hits: int
    done_s: float
    """Until it would have computed the prompt."""
    all_s: float
    """Until all work up to its level, its own included, would be done."""


class Admission:
    """Decides for one generation of lanes."""

    def __init__(self, setting: Setting, num_ranks: int) -> None:
        self.setting = setting
        self.book = LoadBook(num_ranks, setting.num_levels)
        self.promises: dict[Group, Promises] = {}

    # -- lanes --

    def open_lane(self, lane: Lane) -> None:
        """Also when a running lane gets another role: its promises stay."""
        known = self.promises.get(lane.group)
        if known is not None:
            known.serve(lane)
            return
        arena = self.setting.kv.arena
        blocks = arena.num_units // arena.page_units(lane.group)
        self.promises[lane.group] = Promises(
            lane,
            self.setting.tiers.ordered,
            self.setting.cost,
            self.setting.limits,
            blocks * arena.block_tokens,
        )

    def close_lane(self, group: Group) -> None:
        self.promises.pop(group, None)

    # -- requests --

    def route(self, sequence: Sequence, plan: Plan) -> Route:
        """The best lane for a request in the tier it is served as."""
        tier = self.setting.tiers[sequence.tier]
        offers = [self._offer(sequence, lane) for lane in self._lanes(plan, tier.name)]
        if self.setting.rules.admits:
            promising = [offer for offer in offers if self._can(sequence, tier, offer)]
            if promising:
                return self._accept(min(promising, key=_preference), True)
        return self._accept(min(offers, key=_preference), False)

    def is_overloaded(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether load is what keeps lanes from promising it: idle, one of them could."""
        tier = self.setting.tiers[sequence.tier]
        for lane in self._lanes(plan, tier.name):
            offer = self._offer(sequence, lane)
            if tier.deadline_s is not None:
                if offer.work.prefill_s + offer.work.latency_s <= tier.deadline_s:
                    return True
            elif self.promises[lane.group].could(
                tier, len(sequence.tokens), self._positions(sequence), self._slack_s(sequence, tier)
            ):
                return True
        return False

    def add(self, sequence: Sequence, route: Route) -> None:
        """The request stands in the lane's books from now on."""
        level = self.setting.level(sequence)
        self.book.add(sequence, route.lane, level, route.work)
        tier = self.setting.tiers[sequence.tier]
        if route.promised and tier.deadline_s is None:
            self.promises[route.lane.group].add(
                sequence,
                tier,
                len(sequence.tokens),
                self._positions(sequence),
                self._slack_s(sequence, tier),
            )

    def work_on(self, sequence: Sequence, lane: Lane, num_hits: int = 0) -> Work:
        """What is left of it, priced for a lane."""
        estimator = self.setting.estimator
        answer = estimator.answer_tokens(sequence.tier, sequence.request.sampling.max_tokens)
        num_new = len(sequence.tokens) - num_hits * self.setting.kv.arena.block_tokens
        return estimator.work(lane, max(1, num_new), answer)

    def prefilled(self, sequence: Sequence) -> None:
        """Its prompt has been sent."""
        self.book.prefilled(sequence)
        promises = None if sequence.group is None else self.promises.get(sequence.group)
        if promises is not None:
            promises.prefilled(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It ended, or leaves its lane."""
        self.book.remove(sequence)
        promises = None if sequence.group is None else self.promises.get(sequence.group)
        if promises is not None:
            promises.remove(sequence)

    def retry_after_s(self, sequence: Sequence, plan: Plan) -> float:
        """When enough of the work before a deadline request will be done; at least a second."""
        tier = self.setting.tiers[sequence.tier]
        offers = [self._offer(sequence, lane) for lane in self._lanes(plan, tier.name)]
        over_s = min(offer.all_s for offer in offers) - self._slack_s(sequence, tier)
        return max(1.0, over_s)

    def forget_prices(self) -> None:
        """The cost model has learned."""
        for promises in self.promises.values():
            promises.forget_prices()

    # -- inside --

    def _lanes(self, plan: Plan, tier: str) -> list[Lane]:
        lanes = [lane for lane in plan.lanes if lane.role != "decode"]
        return [lane for lane in lanes if lane.serves(tier)] or lanes

    def _offer(self, sequence: Sequence, lane: Lane) -> _Offer:
        setting = self.setting
        hits = setting.kv.prefixes.match(lane.group, sequence.hashes)
        work = self.work_on(sequence, lane, hits)
        before_s = self.book.backlog_s(lane, setting.level(sequence))
        done_s = before_s + work.prefill_s
        return _Offer(lane, work, hits, done_s, before_s + work.total_s)

    def _can(self, sequence: Sequence, tier: Tier, offer: _Offer) -> bool:
        slack_s = self._slack_s(sequence, tier)
        if tier.deadline_s is not None:
            return offer.all_s <= slack_s and offer.work.prefill_s + offer.work.latency_s <= slack_s
        return self.promises[offer.lane.group].can(
            tier, len(sequence.tokens), self._positions(sequence), slack_s
        )

    def _slack_s(self, sequence: Sequence, tier: Tier) -> float:
        """Time until its first token is due, or until all of it is."""
        late_s = max(0.0, self.setting.now() - sequence.request.arrival_s)
        target_s = tier.ttft_s if tier.deadline_s is None else tier.deadline_s
        assert target_s is not None
        return target_s - late_s

    def _positions(self, sequence: Sequence) -> int:
        """Positions it is expected to hold in the end."""
        answer = self.setting.estimator.answer_tokens(
            sequence.tier, sequence.request.sampling.max_tokens
        )
        return len(sequence.tokens) + int(answer)

    def _accept(self, offer: _Offer, promised: bool) -> Route:
        return Route(offer.lane, offer.work, promised)


def _preference(offer: _Offer) -> tuple[float, int]:
    """Soonest done; equal lanes differ by what their prefix caches hold."""
    return (offer.done_s, -offer.num_hits)


def check_queue(tier: Tier, queues: List[TierQueue], num_prompt: int) -> None:
    """Raise the 429 that says a tier's queue is full; work that ran before is not counted."""
    num_requests = sum(len(queue) for queue in queues)
    num_tokens = sum(queue.num_tokens for queue in queues)
    too_many = num_requests >= tier.max_queue_requests
    if not too_many and num_tokens + num_prompt <= tier.max_queue_tokens:
        return
    bound = f"{tier.max_queue_requests} requests" if too_many else f"{tier.max_queue_tokens} tokens"
    raise ApiError(
        f"The queue of tier {tier.name!r} is full ({bound}). Try again later.",
        status=429,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=1.0,
    )


def no_capacity(tier: Tier, retry_after_s: float) -> ApiError:
    """The 429 of a tier that is refused over capacity."""
    return ApiError(
        f"There is no capacity for tier {tier.name!r} now; nothing is billed. Try again in "
        f"{retry_after_s:.0f} s, or ask for another service_tier.",
        status=429,
        type="rate_limit_error",
        code="resource_unavailable",
        retry_after_s=retry_after_s,
    )


def queue_timeout(tier: Tier) -> ApiError:
    """The 429 of a request that waited too long for its first step."""
    return ApiError(
        f"The request waited {tier.queue_timeout_s:.0f} s in the queue of tier {tier.name!r} "
        "without a turn. Try again later, or ask for a higher service_tier.",
        status=429,
        type="rate_limit_error",
        code="queue_timeout",
        retry_after_s=30.0,
    )
