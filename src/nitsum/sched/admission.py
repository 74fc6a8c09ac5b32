"""Where a request goes and what it is promised, or why it cannot come in.

bounded queues      by requests and by tokens of its tier, for every policy
promise             some lane can keep the tier's targets for it
over capacity       what its tier says: downgrade, queue as best effort, refuse
route               a lane that can promise it, with the least work before it; among equals the
                    one that has its prefix

Where a prefill lane hands its requests over, a route has two lanes, and both must be able to
promise their part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from nitsum.errors import ApiError
from nitsum.plan import Group, Lane, Plan
from nitsum.sched.estimate import Work
from nitsum.sched.fairness import Accounts
from nitsum.sched.load import LoadBook
from nitsum.sched.promise import Promises
from nitsum.sched.setting import Setting
from nitsum.sequence import Sequence
from nitsum.tier import Tier

OVER_CAPACITY = "over_capacity"


class Route(NamedTuple):
    """A lane, and what the request will be there."""

    lane: Lane
    work: Work
    promised: bool
    then: Lane | None = None
    """Where its answer is to go on, if that is another lane. It may become a third one."""
    late: bool = False
    """Not promised, but hardly late: it keeps its tier."""


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
    """One lane as seen by one request. In order: soonest done first; equal lanes differ by what
    their prefix caches hold, then by their place in the plan."""

    first_s: float
    """Until its prompt would be computed."""
    minus_hits: int
    """Blocks of its prompt that are cached there, below zero."""
    number: int
    lane: Lane
    work: Work
    before_s: float
    """Work of its level and those above that the lane's ranks have to do first."""
    then: Lane | None = None
    then_before_s: float = 0.0
    """The same of the lane that its answer goes on in."""

    @property
    def done_s(self) -> float:
        """Until all work up to its level, its own included, would be done."""
        return self.before_s + self.then_before_s + self.work.total_s


class Weighed(NamedTuple):
    """What lanes offer a request, worked out once for all that is asked about it on its arrival."""

    asking: _Asking
    offers: list[_Offer]
    """The best first."""


_make_offer: Callable[[tuple[float, int, int, Lane, Work, float, Lane | None, float]], _Offer] = (
    partial(
        tuple.__new__,  # pyright: ignore[reportUnknownMemberType]
        _Offer,
    )
)
"""What `_Offer(...)` does in a third of the time: every arrival makes one a lane."""


class Admission:
    """Decides for one generation of lanes."""

    def __init__(self, setting: Setting, num_ranks: int) -> None:
        self.setting = setting
        self.book = LoadBook(num_ranks, setting.num_levels)
        self.promises: dict[Group, Promises] = {}
        self._serving: dict[tuple[Plan, str], list[Lane]] = {}
        self._followers: dict[tuple[Plan, str], list[Lane]] = {}
        self._then: dict[Sequence, Group] = {}
        """Lanes that promised to go on with requests which others have now."""

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
        """The best lane for a request in the tier it is served as. One that had a promise, or kept
        its tier without, is in the books of a lane that cannot promise it as a late one."""
        weighed = self.weigh(sequence, plan)
        route = self.best(weighed)
        if not route.promised and (sequence.promised or sequence.late):
            return self.best_late(weighed) or route
        return route

    def weigh(self, sequence: Sequence, plan: Plan) -> Weighed:
        """What every lane that takes requests of its tier would be to it, as the books are now."""
        asking = self._ask(sequence)
        return Weighed(asking, self._offers(asking, plan))

    def best(self, weighed: Weighed) -> Route:
        """The best lane that can promise it, or else the best one."""
        asking, offers = weighed
        if self.setting.rules.admits:
            for offer in offers:
                if self._can(asking, offer):
                    return Route(offer.lane, offer.work, True, offer.then)
        return Route(offers[0].lane, offers[0].work, False, offers[0].then)

    def best_late(self, weighed: Weighed) -> Route | None:
        """The best lane that would serve it a little late; None: it would be far too late in all,
        or keep promised answers from their pace."""
        asking, offers = weighed
        if asking.tier.deadline_s is None:
            for offer in offers:
                if self._can(asking, offer, late=True):
                    return Route(offer.lane, offer.work, False, offer.then, late=True)
        return None

    def is_overloaded(self, weighed: Weighed) -> bool:
        """Whether load is what keeps lanes from promising it: idle, one of them could."""
        asking, offers = weighed
        return any(self._could(asking, offer) for offer in offers)

    def add(self, sequence: Sequence, route: Route) -> None:
        """The request stands in the lane's books from now on."""
        lane, then = route.lane, route.then
        self.book.add(sequence, lane, self.setting.level(sequence), route.work, then)
        if (
            not (route.promised or route.late)
            or self.setting.tiers[sequence.tier].deadline_s is not None
        ):
            return
        asking, promises = self._ask(sequence), self.promises[lane.group]
        if then is not None:
            self._then[sequence] = then.group
            self.promises[then.group].add_decode(sequence, asking.num_tokens)
        if sequence.num_remaining > 1:
            num_held = asking.num_prompt if then is not None else asking.num_tokens
            add = promises.add_late if route.late else promises.add
            add(sequence, asking.tier, asking.num_prompt, num_held)
        else:
            promises.add_decode(sequence, asking.num_tokens)

    def route_on(self, sequence: Sequence, lane: Lane, plan: Plan) -> Route:
        """What is left of it, for a lane it was moved to; its promise goes along."""
        asking, then = self._ask(sequence), None
        work = self.setting.estimator.work(lane, asking.num_prompt, asking.answer_tokens)
        if lane.role == "prefill" and sequence.num_remaining > 1:
            then = self._follower(asking, plan)[0]
        return Route(lane, work, sequence.promised, then, sequence.late)

    def prefilled(self, sequence: Sequence) -> None:
        """Its prompt has been sent."""
        self.book.prefilled(sequence)
        promises = None if sequence.group is None else self.promises.get(sequence.group)
        if promises is not None:
            promises.prefilled(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It ended, or leaves its lane."""
        self.book.remove(sequence)
        for group in (sequence.group, self._then.pop(sequence, None)):
            promises = None if group is None else self.promises.get(group)
            if promises is not None:
                promises.remove(sequence)

    def refusal(self, weighed: Weighed) -> ApiError:
        """For a tier that is refused over capacity: to be tried again when enough of the work
        before it will be done, after a second at least."""
        asking, offers = weighed
        done_s = min(offer.done_s for offer in offers)
        return no_capacity(asking.tier, max(1.0, done_s - asking.slack_s))

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
            following = plan.followers
            found = [lane for lane in following if lane.serves(tier)] or list(following)
            self._followers[plan, tier] = found
        return lanes

    def _follower(self, asking: _Asking, plan: Plan) -> tuple[Lane, float]:
        """The lane that should have the answer after a prefill lane, and the work before it."""
        self._lanes(plan, asking.tier.name)

        def preference(lane: Lane) -> tuple[bool, float]:
            tight = asking.tier.deadline_s is None and not self._can_go_on(asking, lane)
            return tight, self.book.backlog_s(lane.group, asking.level)

        lane = min(self._followers[plan, asking.tier.name], key=preference)
        return lane, self.book.backlog_s(lane.group, asking.level)

    def _can_go_on(self, asking: _Asking, lane: Lane) -> bool:
        return self.promises[lane.group].can_decode(asking.tier, asking.num_tokens)

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

    def _offers(self, asking: _Asking, plan: Plan) -> list[_Offer]:
        """Every lane that takes new requests of the tier, the best first."""
        lanes = self._lanes(plan, asking.tier.name)
        match, backlog_s = self.setting.kv.prefixes.match, self.book.backlog_s
        hashes, level = asking.sequence.hashes, asking.level
        prices: dict[tuple[int, int], Work] = {}
        offers: list[_Offer] = []
        for number, lane in enumerate(lanes):
            group = lane.group
            hits, before_s = match(group, hashes), backlog_s(group, level)
            work = prices.get((group.degree, hits))
            if work is None:
                work = prices[group.degree, hits] = self._price(asking, lane, hits)
            then, then_before_s = None, 0.0
            if lane.role == "prefill":
                then, then_before_s = self._follower(asking, plan)
                there = self._price(asking, then, hits)
                work = work._replace(answer_s=there.answer_s, latency_s=there.latency_s)
            first_s = before_s + work.prefill_s
            offers.append(
                _make_offer((first_s, -hits, number, lane, work, before_s, then, then_before_s))
            )
        offers.sort()
        return offers

    def _price(self, asking: _Asking, lane: Lane, hits: int) -> Work:
        """What it costs the lane if so many blocks of its prompt are cached there; the same for all
        lanes of one degree."""
        num_new = max(1, asking.num_prompt - hits * self.setting.kv.arena.block_tokens)
        return self.setting.estimator.work(lane, num_new, asking.answer_tokens)

    def _can(self, asking: _Asking, offer: _Offer, *, late: bool = False) -> bool:
        if asking.tier.deadline_s is not None:
            alone_s = offer.work.prefill_s + offer.work.latency_s
            return max(offer.done_s, alone_s) <= asking.slack_s
        num_tokens = asking.num_tokens
        if offer.then is not None:
            num_tokens = asking.num_prompt
            if not self._can_go_on(asking, offer.then):
                return False
        promises = self.promises[offer.lane.group]
        can = promises.can_late if late else promises.can
        return can(asking.tier, asking.num_prompt, num_tokens, asking.slack_s)

    def _could(self, asking: _Asking, offer: _Offer) -> bool:
        tier, num_prompt = asking.tier, asking.num_prompt
        if tier.deadline_s is not None:
            work = self.setting.estimator.work(offer.lane, num_prompt, asking.answer_tokens)
            return work.prefill_s + offer.work.latency_s <= asking.slack_s
        num_tokens = asking.num_tokens
        if offer.then is not None:
            num_tokens = num_prompt
            if not self.promises[offer.then.group].could_decode(tier, asking.num_tokens):
                return False
        promises = self.promises[offer.lane.group]
        return promises.could(tier, num_prompt, num_tokens, asking.slack_s)


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
