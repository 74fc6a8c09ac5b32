"""Where a request goes and what it is promised, or why it cannot come in.

bounded queues      by requests and by tokens of its tier, for every policy
promise             some lane can keep the tier's targets for it
over capacity       what its tier says: downgrade, queue as best effort, refuse
route               a lane that can promise it, with the least work before it; among equals the
                    one that has its prefix
"""

from __future__ import annotations

from typing import NamedTuple

from nitsum.errors import ApiError
from nitsum.plan import Group, Lane, Plan
from nitsum.request import Sequence
from nitsum.sched.estimate import Work
from nitsum.sched.fairness import Accounts
from nitsum.sched.load import LoadBook
from nitsum.sched.promise import Promises
from nitsum.sched.setting import Setting
from nitsum.tier import Tier

OVER_CAPACITY = "over_capacity"


class Route(NamedTuple):
    """A lane, and what the request will be there."""

    lane: Lane
    work: Work
    promised: bool


class _Asking(NamedTuple):
    """What the decision needs to know of a request, worked out once."""

    sequence: Sequence
    tier: Tier
    level: int
    num_prompt: int
    answer_tokens: float
    """Expected."""
    slack_s: float
    """Time until its first token is due, or for deadline tiers until all of it is."""

    @property
    def num_tokens(self) -> int:
        """Positions it is expected to hold in the end."""
        return self.num_prompt + int(self.answer_tokens)


class _Offer(NamedTuple):
    """One lane as seen by one request."""

    lane: Lane
    work: Work
    num_hits: int
    before_s: float
    """Work of its level and those above that the lane's ranks have to do first."""

    @property
    def done_s(self) -> float:
        """Until all work up to its level, its own included, would be done."""
        return self.before_s + self.work.total_s


class Admission:
    """Decides for one generation of lanes."""

    def __init__(self, setting: Setting, num_ranks: int) -> None:
        self.setting = setting
        self.book = LoadBook(num_ranks, setting.num_levels)
        self.promises: dict[Group, Promises] = {}
        self._serving: dict[tuple[Plan, str], list[Lane]] = {}

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
        asking = self._ask(sequence)
        offers = [self._offer(asking, lane) for lane in self._lanes(plan, sequence.tier)]
        offers.sort(key=_preference)
        if self.setting.rules.admits:
            for offer in offers:
                if self._can(asking, offer):
                    return Route(offer.lane, offer.work, True)
        return Route(offers[0].lane, offers[0].work, False)

    def is_overloaded(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether load is what keeps lanes from promising it: idle, one of them could."""
        asking = self._ask(sequence)
        return any(self._could(asking, lane) for lane in self._lanes(plan, sequence.tier))

    def add(self, sequence: Sequence, route: Route) -> None:
        """The request stands in the lane's books from now on."""
        lane = route.lane
        self.book.add(sequence, lane, self.setting.level(sequence), route.work)
        if route.promised and self.setting.tiers[sequence.tier].deadline_s is None:
            asking = self._ask(sequence)
            self.promises[lane.group].add(
                sequence, asking.tier, asking.num_prompt, asking.num_tokens, asking.slack_s
            )

    def work_on(self, sequence: Sequence, lane: Lane) -> Work:
        """What is left of it, priced for a lane."""
        asking = self._ask(sequence)
        return self.setting.estimator.work(lane, asking.num_prompt, asking.answer_tokens)

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
        asking = self._ask(sequence)
        offers = [self._offer(asking, lane) for lane in self._lanes(plan, sequence.tier)]
        return max(1.0, min(offer.done_s for offer in offers) - asking.slack_s)

    def forget_prices(self) -> None:
        """The cost model has learned."""
        for promises in self.promises.values():
            promises.forget_prices()

    # -- inside --

    def _lanes(self, plan: Plan, tier: str) -> list[Lane]:
        lanes = self._serving.get((plan, tier))
        if lanes is None:
            taking = [lane for lane in plan.lanes if lane.role != "decode"]
            lanes = [lane for lane in taking if lane.serves(tier)] or taking
            self._serving[plan, tier] = lanes
        return lanes

    def _ask(self, sequence: Sequence) -> _Asking:
        setting, request = self.setting, sequence.request
        tier = setting.tiers[sequence.tier]
        target_s = tier.ttft_s if tier.deadline_s is None else tier.deadline_s
        assert target_s is not None
        return _Asking(
            sequence,
            tier,
            setting.levels[sequence.tier],
            len(sequence.tokens),
            setting.estimator.answer_tokens(sequence.tier, request.sampling.max_tokens),
            target_s - max(0.0, setting.clock.now() - request.arrival_s),
        )

    def _offer(self, asking: _Asking, lane: Lane) -> _Offer:
        setting = self.setting
        hits = setting.kv.prefixes.match(lane.group, asking.sequence.hashes)
        num_new = max(1, asking.num_prompt - hits * setting.kv.arena.block_tokens)
        work = setting.estimator.work(lane, num_new, asking.answer_tokens)
        return _Offer(lane, work, hits, self.book.backlog_s(lane.group, asking.level))

    def _can(self, asking: _Asking, offer: _Offer) -> bool:
        if asking.tier.deadline_s is not None:
            alone_s = offer.work.prefill_s + offer.work.latency_s
            return max(offer.done_s, alone_s) <= asking.slack_s
        promises = self.promises[offer.lane.group]
        return promises.can(asking.tier, asking.num_prompt, asking.num_tokens, asking.slack_s)

    def _could(self, asking: _Asking, lane: Lane) -> bool:
        if asking.tier.deadline_s is not None:
            work = self.setting.estimator.work(lane, asking.num_prompt, asking.answer_tokens)
            return work.prefill_s + work.latency_s <= asking.slack_s
        promises = self.promises[lane.group]
        return promises.could(asking.tier, asking.num_prompt, asking.num_tokens, asking.slack_s)


def _preference(offer: _Offer) -> tuple[float, int]:
    """Soonest done; equal lanes differ by what their prefix caches hold."""
    return (offer.before_s + offer.work.prefill_s, -offer.num_hits)


def check_queue(tier: Tier, waiting: Accounts, num_prompt: int) -> None:
    """Raise the 429 that says a tier's queue is full; work that ran before is not counted."""
    too_many = waiting.num_waiting >= tier.max_queue_requests
    if not too_many and waiting.num_waiting_tokens + num_prompt <= tier.max_queue_tokens:
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
