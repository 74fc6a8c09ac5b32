"""What arrives, by tier: counted over a window, over a shorter one when the load has changed.

A change is a count in the last seconds that the long window's rate would hardly ever give (it is
Poisson). Then only what came since counts: the old mix says nothing any more. When it was is the
moment that explains the last seconds of all tiers best, one rate before it and another after
(the likelihood ratio of Page's CUSUM, Biometrika 41, 1954).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Literal, NamedTuple

from nitsum.control.answers import Answer, Answers
from nitsum.control.load import Load, Sample, TierLoad, by_level, starvation, sum_up
from nitsum.events import Arrived, Finished, Refused, Started
from nitsum.tier import TierSet

MAX_SAMPLES = 256
DEVIATIONS = 2.7
"""Standard deviations of a count that nobody takes for chance."""
LEAST_EXPECTED = 1e-2
"""Arrivals of a tier that had none: a rate of nothing would rule the first one out."""
NUM_MOMENTS = 64
"""Of the last seconds, at which a change may have been."""
MEMORY_WINDOWS = 4
"""Arrivals are remembered for this many windows."""

Forecast = Literal["none", "trend"]


class Waiting(NamedTuple):
    """Requests of one tier that no step has contained yet."""

    num: int = 0
    oldest_wait_s: float = 0.0


@dataclass
class TierArrivals:
    """One tier's recent past."""

    times: deque[float] = field(default_factory=deque[float])
    samples: deque[Sample] = field(default_factory=lambda: deque[Sample](maxlen=MAX_SAMPLES))
    answers: Answers = field(default_factory=Answers)
    cached_share: float = 0.0
    first_s: float = float("-inf")
    changed_s: float = float("-inf")
    """Since when its rate is what it is."""

    def rate(self, now: float, window_s: float) -> float:
        """Per second, over the window or since the last change or the first arrival."""
        span_s = self._span_s(now, window_s)
        return self.since(now - span_s) / span_s

    def rate_before(self, end_s: float, window_s: float) -> float:
        """What the rate was then."""
        span_s = self._span_s(end_s, window_s)
        return (self.since(end_s - span_s) - self.since(end_s)) / span_s

    def _span_s(self, end_s: float, window_s: float) -> float:
        return min(window_s, max(end_s - max(self.changed_s, self.first_s), 1.0))

    def since(self, start_s: float) -> int:
        count = 0
        for at_s in reversed(self.times):
            if at_s < start_s:
                break
            count += 1
        return count

    @property
    def may_wait(self) -> bool:
        """It has only a deadline: what counts is what arrives over a long time."""
        return bool(self.samples) and self.samples[-1].deadline_s is not None


class Arrivals:
    """Folds events into the load of every tier."""

    def __init__(
        self,
        tiers: TierSet,
        *,
        window_s: float = 15.0,
        burst_s: float = 3.0,
        forecast: Forecast = "none",
        lead_s: float = 5.0,
    ) -> None:
        self.tiers = tiers
        self.window_s = window_s
        self.burst_s = burst_s
        self.forecast: Forecast = forecast
        self.lead_s = lead_s
        """How far ahead a forecast looks."""
        self.by_tier: dict[str, TierArrivals] = {}
        self._noticed_s = float("-inf")
        """When the last change was noticed; when it was is each tier's `changed_s`."""
        self._open: dict[str, Answer] = {}

    def arrived(self, event: Arrived) -> None:
        tier = self.by_tier.setdefault(event.tier, TierArrivals(first_s=event.at_s))
        tier.times.append(event.at_s)
        while tier.times[0] < event.at_s - MEMORY_WINDOWS * self.window_s:
            tier.times.popleft()
        tier.samples.append(
            Sample(event.num_prompt, event.ttft_target_s, event.tpot_target_s, event.deadline_s)
        )
        answer = self._open[event.request_id] = Answer(event.num_prompt)
        tier.answers.arrived(answer, event.max_tokens)

    def started(self, event: Started, tier: str) -> None:
        answer = self._open.get(event.request_id)
        if answer is None:
            return
        if answer.started_s is None:
            answer.started_s = event.at_s
        if answer.num_prompt:
            known = self.by_tier[tier]
            known.cached_share += 0.05 * (event.num_cached / answer.num_prompt - known.cached_share)

    def ended(self, event: Finished | Refused) -> None:
        answer = self._open.pop(event.request_id, None)
        if answer is None:
            return
        answer.is_over = True
        known = self.by_tier.get(event.tier)
        if known is None or isinstance(event, Refused) or event.reason not in ("stop", "length"):
            return
        known.answers.complete(answer, event.at_s, event.num_output)

    def notice_changes(self, now: float) -> list[str]:
        """Tiers whose last seconds do not fit their rate; from now on only these seconds count,
        for all tiers: a mix changes as a whole. Not before a burst after the last one."""
        if now - self._noticed_s < self.burst_s:
            return []
        changed = [name for name, tier in self.by_tier.items() if self._has_changed(tier, now)]
        if changed:
            self._noticed_s = now
            changed_s = self._moment_of_change(now)
            for tier in self.by_tier.values():
                tier.changed_s = changed_s
        return changed

    def _recent_s(self, now: float) -> float:
        """What is compared with the time before: a burst, and never more than half of what there
        is since the last change, or nothing would be left to compare it with."""
        changed_s = max((tier.changed_s for tier in self.by_tier.values()), default=0.0)
        return min(self.burst_s, (now - changed_s) / 2)

    def _moment_of_change(self, now: float) -> float:
        """Somewhere in the seconds that do not fit."""
        recent_s = self._recent_s(now)
        start_s = now - recent_s
        known = [
            (tier.rate_before(start_s, self.window_s), [t for t in tier.times if t >= start_s])
            for tier in self.by_tier.values()
        ]

        def gain(at_s: float) -> float:
            return sum(
                _likelihood_gain(rate, len(times) - bisect_left(times, at_s), now - at_s)
                for rate, times in known
            )

        moments = [start_s + recent_s * i / NUM_MOMENTS for i in range(NUM_MOMENTS)]
        return max(moments, key=lambda at_s: (gain(at_s), at_s))

    def _has_changed(self, tier: TierArrivals, now: float) -> bool:
        if tier.may_wait or now - tier.first_s < 2 * self.burst_s:
            return False
        recent_s = self._recent_s(now)
        expected = tier.rate(now, self.window_s) * recent_s
        count = tier.since(now - recent_s)
        return abs(count - expected) > DEVIATIONS * sqrt(max(expected, 1.0))

    def load(self, now: float, waiting: dict[str, Waiting] | None = None) -> Load:
        """What is to be served now: every tier with arrivals or waiting requests."""
        waiting = waiting or {}
        loads = [
            self._tier(name, now, self._rate(known, now), waiting.get(name))
            for name, known in self.by_tier.items()
        ]
        return by_level(load for load in loads if load.rate_per_s > 0 or load.num_waiting)

    def load_between(self, start_s: float, end_s: float) -> Load:
        """What really arrived (as far back as four windows)."""
        span_s = max(end_s - start_s, 1e-3)
        loads = [
            self._tier(name, end_s, known.since(start_s) / span_s, None)
            for name, known in self.by_tier.items()
        ]
        return by_level(load for load in loads if load.rate_per_s > 0)

    def _tier(self, name: str, now: float, rate_per_s: float, waiting: Waiting | None) -> TierLoad:
        known = self.by_tier[name]
        num, oldest_s = waiting or Waiting()
        load = sum_up(
            self.tiers[name],
            known.samples,
            rate_per_s=rate_per_s,
            output_tokens=known.answers.mean_tokens(now),
            cached_share=known.cached_share,
            num_waiting=num,
        )
        value = starvation(self.tiers, load, oldest_s)
        return replace(load, value=load.value * value)

    def _rate(self, known: TierArrivals, now: float) -> float:
        if known.may_wait:
            return known.rate(now, MEMORY_WINDOWS * self.window_s)
        rate = known.rate(now, self.window_s)
        if self.forecast == "none":
            return rate
        # The trend between the two halves of the window, drawn on; never below half of the rate.
        half_s = self.window_s / 2
        newer = known.since(now - half_s)
        older = known.since(now - self.window_s) - newer
        slope = (newer - older) / half_s / half_s
        return max(rate / 2, rate + slope * self.lead_s)


def _likelihood_gain(rate_per_s: float, count: int, span_s: float) -> float:
    """How much likelier `count` arrivals in `span_s` are at their own rate than at `rate_per_s`."""
    expected = max(rate_per_s * span_s, LEAST_EXPECTED)
    return expected - count + (count * log(count / expected) if count else 0.0)


def waiting_by_tier(entries: Iterable[tuple[str, float]], now: float) -> dict[str, Waiting]:
    """From (tier, arrival) of everything that waits."""
    found: dict[str, Waiting] = {}
    for tier, arrival_s in entries:
        num, oldest_s = found.get(tier, Waiting())
        found[tier] = Waiting(num + 1, max(oldest_s, now - arrival_s))
    return found
