"""What a plan would serve of a load: requests per second that meet their targets, by tier.

Three steps, each a few multiplications:

    capacity    of one lane for one tier: the largest batch (in the tier's ratio of prompt to answer
                tokens) whose step keeps within the bound of the tightest tier present, the slots,
                the tokens of a step and the KV; requests per second at that batch
    filling     tiers by level into the lanes that serve them; what one leaves over the next gets.
                Lanes that share ranks share their time
    attainment  of the time to first token: an M/G/m queue whose wait has an exponential tail
                (`attainment.py`)

Where prefill lanes hand over, a tier's rate is what both kinds of lanes can bear: prompts alone in
the one, answers alone in the other.

The numbers rank plans; they are estimates, and say so where they are printed. Lanes of equal
degree, tiers and role are one class, so the work does not grow with the number of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, sqrt
from typing import NamedTuple

from nitsum.control.attainment import Queue, attained
from nitsum.control.classes import Shape
from nitsum.control.load import Load, TierLoad
from nitsum.control.steps import StepTimes
from nitsum.plan import Plan, Role

IN_OVERLOAD = 1.06
"""Of a capacity that may be in time: what gives way in overload are long requests, and steps come
up to the target. Calibrated with `attainment.py`."""
BOUND_SHARE = 0.95
"""Of a target that the mean step may take, so that most requests stay below the target."""
DECODE_PATIENCE_S = 3600.0
_NUM_HALVINGS = 6


class Limits(NamedTuple):
    """What bounds a lane beside time."""

    max_num_seqs: int
    max_batch_tokens: int
    kv_tokens: Callable[[int], float]
    """KV room of a lane with ranks of its own, by degree, tokens."""


class Capacity(NamedTuple):
    """One lane serving one tier only, as fast as it may."""

    rate_per_s: float
    step_s: float
    num_decode: float
    bound: str
    """What keeps it from more: targets, slots, step tokens, kv, too slow."""


NOTHING = Capacity(0.0, 0.0, 0.0, "too slow")


class _Then(NamedTuple):
    """Where answers go on after prefill lanes."""

    places: list[int]
    capacities: list[Capacity]
    rate_per_s: float
    share: float
    """Of what the prefill lanes could give them, at most 1."""


class TierScore(NamedTuple):
    """What one tier gets of a plan."""

    tier: str
    rate_per_s: float
    """Arrivals, those that wait already spread over the horizon."""
    feasible_per_s: float
    """Of these, requests that meet their targets."""
    utilisation: float
    """Of the lanes that serve it, by it and more urgent tiers."""
    ttft_p99_s: float
    tpot_s: float
    bound: str


class PlanScore(NamedTuple):
    plan: str
    value: float
    """Feasible requests per second, weighted by the tiers' values: what plans are compared by."""
    tiers: tuple[TierScore, ...]
    utilisation: float
    """Of the busiest class of lanes."""

    @property
    def feasible_per_s(self) -> float:
        return sum(tier.feasible_per_s for tier in self.tiers)


class Scorer:
    """Scores plans for one load after another; remembers capacities while the load is the same."""

    def __init__(self, steps: StepTimes, limits: Limits, horizon_s: float = 10.0) -> None:
        self.steps = steps
        self.limits = limits
        self.horizon_s = horizon_s
        """In which requests that wait already are to be served."""
        self._load: Load = ()
        self._capacities: dict[tuple[int, str, int, Role], Capacity] = {}
        self._alone_s: dict[tuple[int, str], list[float]] = {}

    def score(self, plan: Plan | Shape, load: Load) -> PlanScore:
        """Tiers of `load` must come by level, the most urgent first."""
        if load is not self._load:
            self._load = load
            self._capacities.clear()
            self._alone_s.clear()
        shape = plan if isinstance(plan, Shape) else Shape.of(plan)
        filling = _Filling(self, shape)
        tiers = tuple(filling.add(tier) for tier in load)
        values = {tier.tier: tier.value for tier in load}
        value = sum(values[tier.tier] * tier.feasible_per_s for tier in tiers)
        return PlanScore(shape.name, value, tiers, max(filling.used, default=0.0))

    def horizon_of(self, load: TierLoad) -> float:
        """Work with a deadline may wait for a good part of it."""
        return max(self.horizon_s, (load.deadline_s or 0.0) / 4)

    def capacity(
        self, degree: int, load: TierLoad, bound_s: float, role: Role = "mixed"
    ) -> Capacity:
        """At steps of at most `bound_s` seconds, of a lane that does its role's part only."""
        key = (degree, load.tier, int(bound_s * 1e4), role)
        found = self._capacities.get(key)
        if found is None:
            part = of_role(load, role)
            found = self._capacities[key] = self._capacity(degree, part, bound_s)
        return found

    def prefills_s(self, degree: int, load: TierLoad) -> list[float]:
        """Of the tier's probes, each alone on an idle lane."""
        found = self._alone_s.get((degree, load.tier))
        if found is None:
            longest = self.limits.max_batch_tokens
            found = self._alone_s[degree, load.tier] = [
                self.steps.prefill_s(degree, probe.prompt_tokens, longest) for probe in load.probes
            ]
        return found

    def _capacity(self, degree: int, load: TierLoad, bound_s: float) -> Capacity:
        room, bound = self._room(degree, load)
        step_s = self._step_s(degree, load, room)
        if step_s > bound_s:
            low, low_s, high = 0.0, 0.0, room
            bound = "targets"
            for _ in range(_NUM_HALVINGS):
                # Between a batch of nothing and a full one, orders of magnitude lie: halve ratios.
                middle = sqrt(low * high) if low else high / 8.0
                middle_s = self._step_s(degree, load, middle)
                if middle_s <= bound_s:
                    low, low_s = middle, middle_s
                else:
                    high = middle
            room, step_s = low, low_s
        if room * (load.output_tokens + load.prompt_tokens) < 0.05 or step_s <= 0.0:
            return NOTHING
        return Capacity(room / step_s, step_s, room * load.output_tokens, bound)

    def _room(self, degree: int, load: TierLoad) -> tuple[float, str]:
        """Requests' worth of tokens one step may hold at most, and what says so."""
        limits = self.limits
        num_tokens = load.output_tokens + load.prompt_tokens
        answers = max(load.output_tokens, 1e-9)
        return min(
            (limits.max_num_seqs / answers, "slots"),
            (limits.max_batch_tokens / num_tokens, "step tokens"),
            (limits.kv_tokens(degree) / load.mean_context_tokens / answers, "kv"),
        )

    def _step_s(self, degree: int, load: TierLoad, requests: float) -> float:
        """The step that does `requests` prompts and as many answers' tokens."""
        num_decode = requests * load.output_tokens
        prefill = requests * load.prompt_tokens
        context = num_decode * load.mean_context_tokens
        return self.steps.seconds(degree, num_decode, context, prefill, load.prompt_tokens / 2)


def of_role(load: TierLoad, role: Role) -> TierLoad:
    """The part of the tier's work that a lane of the role does."""
    match role:
        case "prefill":
            return replace(load, output_tokens=0.0)
        case "decode":
            context = max(load.context_tokens, load.prompt_tokens)
            return replace(load, prompt_tokens=0.0, context_tokens=context)
        case _:
            return load


def bound_of(load: TierLoad) -> float:
    """Longest mean step under which the tier's answers are in time."""
    if load.tpot_s is not None:
        return load.tpot_s * BOUND_SHARE
    patience_s = load.deadline_s or DECODE_PATIENCE_S
    return patience_s / 2 / load.output_tokens


class _Filling:
    """The state while tiers are put into a plan's lanes."""

    def __init__(self, scorer: Scorer, shape: Shape) -> None:
        self.scorer = scorer
        self.shape = shape
        num = len(shape.classes)
        self.over = [
            [(a, row[c]) for a, row in enumerate(shape.cover) if row[c]] for c in range(num)
        ]
        """By class: those that use its ranks, itself included, and their part of them."""
        self.used = [0.0] * num
        """Share of time that each class's lanes work for the tiers added so far."""
        self.bound_s = [DECODE_PATIENCE_S] * num
        """The tightest bound among tiers that are in each class."""
        self.presence = [0.0] * num
        """Chance that a request which sets that bound is there."""
        self.step_s = [0.0] * num

    def add(self, load: TierLoad) -> TierScore:
        scorer, shape = self.scorer, self.shape
        rate = load.rate_per_s + load.num_waiting / scorer.horizon_of(load)
        places = self._places(load)
        capacities = [self._capacity(c, load) for c in places]
        left = [self._left(c) / self._sharers(c, places) for c in places]
        rates = [
            shape.classes[c].num_lanes * capacity.rate_per_s * room
            for c, capacity, room in zip(places, capacities, left, strict=True)
        ]
        then = self._then(
            load, sum(r for c, r in zip(places, rates, strict=True) if self._hands(c))
        )
        rates = [
            r * then.share if self._hands(c) else r for c, r in zip(places, rates, strict=True)
        ]
        total = sum(rates)
        if total <= 0.0 or rate <= 0.0:
            slow = next((c.bound for c in capacities if not c.rate_per_s), "no lane")
            bound = slow if total <= 0.0 else ""
            return TierScore(load.tier, rate, 0.0, 1.0 if rate else 0.0, 0.0, 0.0, bound)
        share = rate / total
        feasible = ttft = tpot = 0.0
        for c, capacity, room, of_class in zip(places, capacities, left, rates, strict=True):
            if of_class <= 0.0:
                continue
            step_s = self._mean_step(c, capacity, share)
            met, ttft_s = self._attained(c, load, capacity, room, share, step_s)
            served = rate * of_class / total
            feasible += min(served, of_class * IN_OVERLOAD) * met
            ttft, tpot = max(ttft, ttft_s), max(tpot, step_s)
            self._use(c, load, capacity, room * min(1.0, share), served)
            if self._hands(c):
                tpot = max(tpot, self._go_on(then, load, min(served, of_class)))
        worst = max(range(len(places)), key=lambda i: rates[i])
        return TierScore(
            load.tier,
            rate,
            feasible,
            max(self.used[c] for c in places),
            ttft,
            tpot,
            capacities[worst].bound,
        )

    def _places(self, load: TierLoad) -> list[int]:
        classes = self.shape.classes
        able = [c for c, lane in enumerate(classes) if lane.role != "decode"]
        serving = [c for c in able if classes[c].serves(load.tier)]
        return serving or able

    def _hands(self, c: int) -> bool:
        return self.shape.classes[c].role == "prefill"

    def _then(self, load: TierLoad, rate_per_s: float) -> _Then:
        """The lanes that go on after prefill lanes, which could give them `rate_per_s`."""
        if not rate_per_s:
            return _Then([], [], 0.0, 1.0)
        classes = self.shape.classes
        after = [c for c, lane in enumerate(classes) if lane.role != "prefill"]
        serving = [c for c in after if classes[c].serves(load.tier)] or after
        bound_s = bound_of(load)
        caps = [
            self.scorer.capacity(classes[c].degree, load, min(bound_s, self.bound_s[c]), "decode")
            for c in serving
        ]
        total = sum(
            classes[c].num_lanes * cap.rate_per_s * self._left(c)
            for c, cap in zip(serving, caps, strict=True)
        )
        return _Then(serving, caps, total, min(1.0, total / rate_per_s))

    def _go_on(self, then: _Then, load: TierLoad, rate_per_s: float) -> float:
        """Book the answers of so many requests; the time of a step in their lanes."""
        share, step_s = min(1.0, rate_per_s / max(then.rate_per_s, 1e-12)), 0.0
        for c, capacity in zip(then.places, then.capacities, strict=True):
            of_class = share * self._left(c)
            served = self.shape.classes[c].num_lanes * capacity.rate_per_s * of_class
            self._use(c, load, capacity, of_class, served)
            step_s = max(step_s, self._mean_step(c, capacity, share))
        return step_s

    def _sharers(self, c: int, places: list[int]) -> float:
        """How many of `places` use the class's ranks, itself included: they halve its time."""
        return sum(part for a, part in self.over[c] if a in places)

    def _left(self, c: int) -> float:
        """Share of its time that a class's lanes have left."""
        used = self.used
        return max(0.0, 1.0 - sum([part * used[a] for a, part in self.over[c]]))

    def _capacity(self, c: int, load: TierLoad) -> Capacity:
        """As the tiers before it leave it: a tight one that is there keeps the steps short."""
        degree = self.shape.classes[c].degree
        if self._hands(c):
            return self.scorer.capacity(degree, load, DECODE_PATIENCE_S, "prefill")
        own_s = bound_of(load)
        tight_s, presence = own_s, 0.0
        for a, part in self.over[c]:
            if not self.presence[a]:
                continue
            # A lane over the same ranks takes turns: both steps have to fit.
            bound_s = self.bound_s[a] - (0.0 if a == c else self.step_s[a])
            if bound_s < tight_s:
                tight_s, presence = bound_s, self.presence[a] * part
        free = self.scorer.capacity(degree, load, own_s)
        if not presence:
            return free
        tight = self.scorer.capacity(degree, load, max(tight_s, 0.0))
        rate = presence * tight.rate_per_s + (1.0 - presence) * free.rate_per_s
        return free._replace(rate_per_s=rate) if presence < 0.5 else tight._replace(rate_per_s=rate)

    def _use(
        self, c: int, load: TierLoad, capacity: Capacity, share: float, rate_per_s: float
    ) -> None:
        self.used[c] += share
        self.step_s[c] = max(self.step_s[c], self._mean_step(c, capacity, share))
        if self._hands(c):
            return
        bound_s = bound_of(load)
        running = (
            rate_per_s / self.shape.classes[c].num_lanes * load.output_tokens * capacity.step_s
        )
        if bound_s < self.bound_s[c]:
            self.bound_s[c] = bound_s
            self.presence[c] = 1.0 - exp(-running)

    def _mean_step(self, c: int, capacity: Capacity, share: float) -> float:
        """Between the step of one request and the step at capacity."""
        if not capacity.rate_per_s:
            return 0.0
        alone_s = self.scorer.steps.decode_s(self.shape.classes[c].degree)
        return alone_s + (max(alone_s, capacity.step_s) - alone_s) * min(1.0, share)

    def _attained(
        self,
        c: int,
        load: TierLoad,
        capacity: Capacity,
        room: float,
        share: float,
        step_s: float,
    ) -> tuple[float, float]:
        """Share of the class's requests whose first token is in time; P99 of that time. `step_s`
        is the mean of its steps."""
        lane = self.shape.classes[c]
        queue = Queue(
            num_lanes=lane.num_lanes,
            busy=1.0 - room * (1.0 - min(1.0, share)),
            step_s=step_s + self._other_steps(c),
            service_s=1.0 / (capacity.rate_per_s * max(room, 0.02)),
        )
        return attained(load, self.scorer.prefills_s(lane.degree, load), queue)

    def _other_steps(self, c: int) -> float:
        """Mean steps of lanes that share the ranks and may come first."""
        return sum(
            part * self.step_s[a] * min(1.0, self.used[a]) for a, part in self.over[c] if a != c
        )
