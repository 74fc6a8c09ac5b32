"""Which plan, and when: value gained over the expected stay, less the price of getting there.

    every window, and at once when the load of a tier changes:
        load      what arrives and waits, by tier
        scores    of every resident plan on that load
        decide    go where (value there - value here) x dwell > price + margin, unless too soon

    price = value served now x seconds that the move takes out of the machine

The controller sees the engine through events (it is a sink of them) and a narrow view. It answers
for itself: every decision is an event with all scores, and once it is over another one says by how
much the best plan would have been ahead on what really arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

from nitsum.control.classes import Shape
from nitsum.control.forecast import Arrivals, Forecast, waiting_by_tier
from nitsum.control.load import Load, TierLoad
from nitsum.control.outcomes import Outcomes
from nitsum.control.price import Held, SwitchPrice
from nitsum.control.score import PlanScore, Scorer
from nitsum.cost.protocol import CostModel
from nitsum.events import (
    AnyEvent,
    Arrived,
    Finished,
    PlanDecided,
    PlanJudged,
    PlanScored,
    Refused,
    Started,
    StepEnded,
    SwitchEnded,
    TierObserved,
)
from nitsum.plan import Plan, PlanSet
from nitsum.tier import TierSet

MAX_REMEMBERED = 256


class View(Protocol):
    """What the controller sees of the engine, and all it may do to it."""

    def now(self) -> float: ...

    def emit(self, event: AnyEvent) -> None: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def may_switch(self) -> bool:
        """No switch is under way, and the engine is not shutting down."""
        ...

    def waiting(self) -> Iterable[tuple[str, float]]:
        """(tier, arrival) of every request that no step has contained yet."""
        ...

    def held(self) -> list[Held]: ...

    @property
    def factors(self) -> dict[int, float]:
        """Realised over predicted step times by degree, as the engine has learnt them."""
        ...

    @property
    def token_bytes(self) -> int:
        """KV of one token, all heads and layers."""
        ...

    def go_to(self, op_id: str, plan: str, reason: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How eager the controller is."""

    window_s: float = 1.0
    """Between two looks at everything."""
    look_s: float = 0.2
    """Between two looks for a change of the load."""
    margin: float = 0.05
    """A plan must promise this share more than the one in force, and more while few requests were
    seen: see `noise`."""
    noise: float = 0.5
    """Added to the margin, over the root of the number of requests that the load was seen in."""
    min_dwell_s: float = 5.0
    """After the end of a switch before the next."""
    max_switches_per_minute: int = 6
    expected_dwell_s: float = 20.0
    """Assumed stay in a plan until stays have been seen."""
    num_agree: int = 2
    """Looks in a row that must choose the same plan."""
    judge_s: float = 30.0
    """A decision to stay is judged after this long at the latest."""
    forecast: Forecast = "none"


@dataclass(frozen=True, kw_only=True)
class Look:
    """Everything a decision is made from."""

    at_s: float
    trigger: str
    load: Load
    current: str
    scores: dict[str, PlanScore]
    prices: dict[str, float]
    """Seconds of the machine's time to get to each other plan."""
    dwell_s: float
    margin: float
    """Share of the value in force that a plan must promise more."""

    def price_per_s(self, plan: str) -> float:
        """Value lost on the way, spread over the expected stay."""
        return self.scores[self.current].value * self.prices.get(plan, 0.0) / self.dwell_s

    def gain(self, plan: str) -> float:
        """Value per second over the expected stay, the price of getting there included."""
        return self.scores[plan].value - self.scores[self.current].value - self.price_per_s(plan)

    def scored(self) -> list[PlanScored]:
        """All plans, the best first."""
        return [
            PlanScored(
                plan=score.plan,
                value=score.value,
                feasible_per_s={tier.tier: tier.feasible_per_s for tier in score.tiers},
                switch_cost=self.price_per_s(score.plan),
            )
            for score in sorted(self.scores.values(), key=lambda score: -score.value)
        ]


class Controller:
    """Decides; also an `EventSink`, through which it learns what happens."""

    def __init__(
        self,
        plans: PlanSet,
        tiers: TierSet,
        scorer: Scorer,
        cost: CostModel,
        rules: Rules | None = None,
    ) -> None:
        self.rules = rules or Rules()
        self.scorer = scorer
        self.arrivals = Arrivals(tiers, forecast=self.rules.forecast)
        self.outcomes = Outcomes()
        self.shapes = {plan.name: Shape.of(plan) for plan in plans.plans}
        self.plans = plans
        self.recent: deque[PlanDecided | PlanJudged] = deque(maxlen=MAX_REMEMBERED)
        self.num_decisions = 0
        self.dwell_s = self.rules.expected_dwell_s
        self.trust: dict[str, float] = {}
        """Realised over predicted goodput of plans that were in force; 1 where none was."""
        self.price = SwitchPrice(cost, scorer.steps, plans.num_ranks)
        self._switch_times: deque[float] = deque()
        self._dwelling_since_s: float | None = None
        self._ended_s = float("-inf")
        self._look_s = self._window_s = float("-inf")
        self._agreed: tuple[str, int] = ("", 0)
        self._open: list[PlanDecided] = []
        """Decisions not judged yet, all for the same plan."""

    # -- learning --

    def emit(self, event: AnyEvent) -> None:
        match event:
            case StepEnded():
                self.outcomes.stepped(event)
            case Arrived():
                self.arrivals.arrived(event)
                self.outcomes.arrived(event)
            case Started():
                self.arrivals.started(event, self.outcomes.tier_of(event.request_id))
            case Finished() | Refused():
                self.arrivals.ended(event)
                self.outcomes.ended(event)
            case SwitchEnded():
                self._switch_ended(event)
            case _:
                pass

    def _switch_ended(self, event: SwitchEnded) -> None:
        self._ended_s = event.at_s
        self.price.ended(event.duration_s)

    # -- deciding --

    def tick(self, view: View) -> None:
        """Called every turn of the engine; mostly returns at once."""
        now = view.now()
        if now - self._look_s < self.rules.look_s:
            return
        self._look_s = now
        changed = self.arrivals.notice_changes(now)
        if changed:
            self._decide(view, now, f"change of {', '.join(changed)}")
        elif now - self._window_s >= self.rules.window_s:
            self._decide(view, now, "window")

    def _decide(self, view: View, now: float, trigger: str) -> None:
        self._window_s = now
        load = self.arrivals.load(now, waiting_by_tier(view.waiting(), now))
        if not load:
            return
        current = view.plan.name
        self.scorer.steps.factors = dict(view.factors)
        look = Look(
            at_s=now,
            trigger=trigger,
            load=load,
            current=current,
            scores={name: self._score(name, load) for name in self.shapes},
            prices={p.name: self._price(view, p) for p in self.plans.plans if p.name != current},
            dwell_s=self.dwell_s,
            margin=self._margin(load),
        )
        chosen, reason = self._choose(look, view)
        decided = self._record(view, look, chosen, reason)
        if chosen != current:
            self._go(view, now, decided)
        elif now - self._open[0].at_s >= self.rules.judge_s:
            self._judge(view, now)

    def _score(self, name: str, load: Load) -> PlanScore:
        """With what was learnt about the plan taken into account."""
        score = self.scorer.score(self.shapes[name], load)
        return score._replace(value=score.value * self._trust_in(name))

    def _trust_in(self, name: str) -> float:
        """Of a plan that was not in force yet as much as of the others: an estimate that was too
        high here is likely to be so there."""
        known = self.trust
        return known.get(name, sum(known.values()) / len(known) if known else 1.0)

    def _margin(self, load: Load) -> float:
        num_seen = sum(t.rate_per_s * self.arrivals.window_s + t.num_waiting for t in load)
        return self.rules.margin + self.rules.noise / sqrt(max(1.0, num_seen))

    def _learn(self, plan: str, predicted_per_s: float, realised_per_s: float) -> None:
        """Never above 1: serving more than predicted only says that the load was light."""
        if predicted_per_s <= 0.0:
            return
        ratio = min(1.0, max(0.2, realised_per_s / predicted_per_s))
        known = self.trust.get(plan, 1.0)
        self.trust[plan] = known + 0.5 * (ratio - known)

    def _choose(self, look: Look, view: View) -> tuple[str, str]:
        """The plan to be in, and why."""
        current, best = look.current, max(look.prices, key=look.gain, default=look.current)
        if best == current:
            return current, "there is no other plan"
        if look.gain(best) <= look.margin * look.scores[current].value:
            self._agreed = ("", 0)
            return current, f"no plan promises {look.margin:.0%} more, its price included"
        name, times = self._agreed
        self._agreed = (best, times + 1 if name == best else 1)
        sure = look.gain(best) > 2 * look.margin * look.scores[current].value
        in_time = look.trigger != "window" and sure
        if self._agreed[1] < self.rules.num_agree and not in_time:
            return current, f"{best} looks better; it has to do so in the next window too"
        hindrance = self._hindrance(look.at_s, view)
        if hindrance:
            return current, f"{best} would be better, but {hindrance}"
        return best, f"{best} promises {look.gain(best):.2f}/s more, its price included"

    def _hindrance(self, now: float, view: View) -> str:
        """Why no switch may start now; empty when one may."""
        while self._switch_times and self._switch_times[0] < now - 60.0:
            self._switch_times.popleft()
        if not view.may_switch:
            return "a switch is under way"
        if now - self._ended_s < self.rules.min_dwell_s:
            return "the last switch was a moment ago"
        if len(self._switch_times) >= self.rules.max_switches_per_minute:
            return "the minute's switches are used up"
        return ""

    def _price(self, view: View, target: Plan) -> float:
        return self.price.seconds(view.held(), target, view.token_bytes)

    def _go(self, view: View, now: float, decided: PlanDecided) -> None:
        self._judge(view, now)
        self._open = [decided]
        if self._dwelling_since_s is not None:
            stay_s = min(120.0, now - self._dwelling_since_s)
            self.dwell_s += 0.3 * (stay_s - self.dwell_s)
        self._dwelling_since_s = now
        self._switch_times.append(now)
        self.price.began(view.held(), self.plans[decided.chosen], view.token_bytes)
        self._agreed = ("", 0)
        view.go_to(f"decision-{decided.decision}", decided.chosen, decided.reason)

    # -- telling --

    def _record(self, view: View, look: Look, chosen: str, reason: str) -> PlanDecided:
        self.num_decisions += 1
        decided = PlanDecided(
            at_s=look.at_s,
            decision=self.num_decisions,
            plan=look.current,
            chosen=chosen,
            reason=reason,
            trigger=look.trigger,
            scores=look.scored(),
            load={tier.tier: _observed(tier) for tier in look.load},
            expected_dwell_s=look.dwell_s,
            correction=dict(self.scorer.steps.factors),
        )
        self._open.append(decided)
        self.recent.append(decided)
        view.emit(decided)
        return decided

    def _judge(self, view: View, now: float) -> None:
        """Score the plans again on what arrived since the decisions in `_open`. What a plan had in
        time while it took over, from one that was too slow perhaps, says little about it."""
        decided, self._open = self._open, self._open[-1:]
        start_s = decided[0].at_s
        load = self.arrivals.load_between(start_s, now)
        if not load or now - start_s < self.rules.window_s:
            return
        scores = [self._score(name, load) for name in self.shapes]
        chosen = decided[0].chosen
        own = next(score for score in scores if score.plan == chosen)
        best = max(scores, key=lambda score: score.value)
        means = [_of_plan(d, chosen) for d in decided]
        judged = PlanJudged(
            at_s=now,
            decision=decided[0].decision,
            plan=chosen,
            best=best.plan,
            regret=best.value - own.value,
            predicted_per_s=sum(means) / len(means),
            realised_per_s=self.outcomes.take_met() / (now - start_s),
            duration_s=now - start_s,
        )
        had_settled = start_s >= self._ended_s + self.rules.min_dwell_s
        if had_settled and judged.duration_s >= self.rules.judge_s / 3:
            self._learn(chosen, judged.predicted_per_s, judged.realised_per_s)
        self.recent.append(judged)
        view.emit(judged)


def _of_plan(decided: PlanDecided, plan: str) -> float:
    return sum(next(s for s in decided.scores if s.plan == plan).feasible_per_s.values())


def _observed(tier: TierLoad) -> TierObserved:
    return TierObserved(
        rate_per_s=tier.rate_per_s,
        prompt_tokens=tier.prompt_tokens,
        output_tokens=tier.output_tokens,
        num_waiting=tier.num_waiting,
    )
