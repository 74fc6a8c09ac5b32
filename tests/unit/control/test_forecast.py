"""Rates, changes and outcomes, from events."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.control.forecast import Arrivals, Waiting, waiting_by_tier
from nitsum.control.outcomes import Outcomes
from nitsum.events import Arrived, Finished, Started, StepEnded
from nitsum.plan import Group
from nitsum.tier import TierSet


def arrived(name: str, at_s: float, tier: str = "default", prompt: int = 100) -> Arrived:
    return Arrived(
        at_s=at_s,
        request_id=name,
        tier_asked=tier,
        tier=tier,
        tenant="",
        num_prompt=prompt,
        max_tokens=1000,
        arrival_s=at_s,
        ttft_target_s=None if tier == "batch" else 1.0,
        tpot_target_s=None if tier == "batch" else 0.1,
        deadline_s=600.0 if tier == "batch" else None,
    )


def finished(name: str, at_s: float, num_output: int = 11, tier: str = "default") -> Finished:
    return Finished(
        at_s=at_s,
        request_id=name,
        tier=tier,
        reason="length",
        num_output=num_output,
        num_cached=0,
        group=None,
    )


def steady(arrivals: Arrivals, start_s: float, end_s: float, per_s: int, tier: str) -> None:
    for i in range(int((end_s - start_s) * per_s)):
        arrivals.arrived(arrived(f"{tier}{start_s}-{i}", start_s + i / per_s, tier))


LENGTHS = [10, 20, 40, 80, 160, 320, 640]
MEAN = sum(LENGTHS) / len(LENGTHS)


def served(arrivals: Arrivals, last_s: float, until_s: float) -> None:
    """Answers of all lengths in turns, seven arriving a second, each token taking as long."""
    ends, per_s, token_s = [], 7, 0.05
    for i in range(int(last_s * per_s)):
        at_s, num_tokens = i / per_s, LENGTHS[i % len(LENGTHS)]
        arrivals.arrived(arrived(f"r{i}", at_s))
        start = Started(at_s=at_s, request_id=f"r{i}", group=Group(1, 0), step_id=1, num_cached=0)
        arrivals.started(start, "default")
        ends.append((at_s + num_tokens * token_s, f"r{i}", num_tokens))
    for end_s, name, num_tokens in sorted(ends):
        if end_s <= until_s:
            arrivals.ended(finished(name, end_s, num_tokens))


@pytest.mark.parametrize("until_s", [4.0, 8.0, 16.0, 60.0])
def test_answers_that_still_run_count_as_far_as_they_are(until_s: float):
    """Of those that have ended after four seconds, none is longer than 80 tokens, half of them 20
    and less: a mean of 33. Lengths here are spread more than exponential ones."""
    arrivals = Arrivals(TierSet())
    served(arrivals, until_s, until_s)
    (load,) = arrivals.load(until_s)
    assert 0.5 * MEAN < load.output_tokens < 1.4 * MEAN


def test_the_last_to_end_are_not_taken_for_all():
    """When a tier's requests have ceased, the longest answers end last."""
    arrivals = Arrivals(TierSet())
    served(arrivals, 30.0, 70.0)
    assert arrivals.by_tier["default"].answers.mean_tokens(70.0) == pytest.approx(MEAN)


def test_what_was_broken_off_is_no_length():
    arrivals = Arrivals(TierSet())
    for i in range(20):
        arrivals.arrived(arrived(f"r{i}", 0.1 * i))
        end = finished(f"r{i}", 0.1 * i + 1.0, 7 if i % 2 else 40)
        arrivals.ended(msgspec.structs.replace(end, reason="abort" if i % 2 else "length"))
    assert arrivals.by_tier["default"].answers.mean_tokens(4.0) == 40.0


def test_a_steady_rate_is_the_rate():
    arrivals = Arrivals(TierSet())
    steady(arrivals, 0.0, 30.0, 5, "default")
    assert arrivals.notice_changes(30.0) == []
    (load,) = arrivals.load(30.0)
    assert load.rate_per_s == pytest.approx(5.0, rel=0.05)


def test_after_a_change_only_what_came_since_counts():
    arrivals = Arrivals(TierSet())
    steady(arrivals, 0.0, 30.0, 5, "default")
    steady(arrivals, 30.0, 33.0, 30, "default")
    assert arrivals.notice_changes(33.0) == ["default"]
    assert arrivals.load(33.0)[0].rate_per_s == pytest.approx(30.0, rel=0.1)
    assert arrivals.notice_changes(33.2) == [], "one change is noticed once"


def test_a_mix_that_flips_is_forgotten_from_the_moment_it_flipped():
    """Work with a deadline ends as chats begin: two seconds later its rate is nothing, although the
    last seconds, in which the change was noticed, had much of it."""
    arrivals = Arrivals(TierSet())
    steady(arrivals, 0.0, 5.0, 8, "default")
    steady(arrivals, 5.0, 30.0, 30, "batch")
    steady(arrivals, 30.0, 31.0, 8, "default")
    assert arrivals.notice_changes(31.0) == ["default"]
    steady(arrivals, 31.0, 32.0, 8, "default")
    rates = {load.tier: load.rate_per_s for load in arrivals.load(32.0)}
    assert rates.get("batch", 0.0) < 2.0
    assert rates["default"] == pytest.approx(8.0, rel=0.2)


@pytest.mark.parametrize("ago_s", [0.5, 1.0, 2.0, 2.9])
def test_the_moment_of_a_change_is_found(ago_s: float):
    arrivals = Arrivals(TierSet())
    steady(arrivals, 0.0, 30.0, 20, "default")
    steady(arrivals, 30.0, 30.0 + ago_s, 100, "default")
    assert arrivals.notice_changes(30.0 + ago_s) == ["default"]
    changed_s = arrivals.by_tier["default"].changed_s
    assert changed_s == pytest.approx(30.0, abs=0.15)


def notices(arrivals: Arrivals, mixes: list[tuple[float, float, int, str]]) -> list[float]:
    """When changes are noticed that are looked for every 0.2 s, of (start, end, rate, tier)."""
    events = [
        arrived(f"{tier}{start_s}-{i}", start_s + i / per_s, tier)
        for start_s, end_s, per_s, tier in mixes
        for i in range(int((end_s - start_s) * per_s))
    ]
    found: list[float] = []
    for look in range(1, round(mixes[-1][1] / 0.2)):
        now = 0.2 * look
        while events and events[0].at_s <= now:
            arrivals.arrived(events.pop(0))
        if arrivals.notice_changes(now):
            found.append(now)
    return found


@given(st.floats(1.0, 8.0), st.integers(8, 12), st.integers(20, 40))
def test_a_change_soon_after_another_is_noticed_a_burst_after_it_at_the_latest(
    stay_s: float, chats_per_s: int, reads_per_s: int
):
    """Or once it has lasted two seconds; however near to its notice the one before was dated."""
    arrivals = Arrivals(TierSet())
    back_s = 30.0 + stay_s
    found = notices(
        arrivals,
        [
            (0.0, 8.0, reads_per_s, "default"),
            (8.0, 30.0, chats_per_s, "priority"),
            (30.0, back_s, reads_per_s, "default"),
            (back_s, back_s + 6.0, chats_per_s, "priority"),
        ],
    )
    first_s, second_s = (at_s for at_s in found if at_s > 30.0)
    assert first_s <= 31.0
    assert second_s <= max(first_s + arrivals.burst_s, back_s + 2.0) + 0.2
    assert arrivals.by_tier["priority"].changed_s == pytest.approx(back_s, abs=0.7)


def test_a_burst_of_work_with_a_deadline_is_no_change():
    arrivals = Arrivals(TierSet())
    steady(arrivals, 0.0, 30.0, 1, "batch")
    steady(arrivals, 30.0, 33.0, 50, "batch")
    assert arrivals.notice_changes(33.0) == []
    assert arrivals.load(33.0)[0].rate_per_s < 10.0


def test_answers_teach_their_length():
    arrivals = Arrivals(TierSet())
    arrivals.arrived(arrived("a", 0.0))
    assert arrivals.load(1.0)[0].output_tokens == 256.0, "max_tokens is a bound, not a forecast"
    arrivals.ended(finished("a", 1.0, 40))
    assert arrivals.load(1.0)[0].output_tokens == 40.0


def test_a_trend_is_drawn_on_if_asked_for():
    rising = {}
    for forecast in ("none", "trend"):
        arrivals = Arrivals(TierSet(), forecast=forecast)
        steady(arrivals, 0.0, 7.5, 2, "default")
        steady(arrivals, 7.5, 15.0, 6, "default")
        rising[forecast] = arrivals.load(15.0)[0].rate_per_s
    assert rising["trend"] > rising["none"] * 1.3


def test_waiting_requests_by_tier():
    found = waiting_by_tier([("batch", 1.0), ("batch", 3.0), ("priority", 9.0)], 10.0)
    assert found == {"batch": Waiting(2, 9.0), "priority": Waiting(1, 1.0)}


@pytest.mark.parametrize(
    ("first_s", "end_s", "num_met"), [(0.5, 1.4, 1), (1.5, 2.0, 0), (0.5, 2, 0)]
)
def test_a_request_meets_all_its_targets_or_none(first_s: float, end_s: float, num_met: int):
    """TTFT within 1 s and ten gaps within 0.1 s each."""
    outcomes = Outcomes()
    outcomes.arrived(arrived("a", 0.0))
    for at_s in (first_s, end_s):
        outcomes.stepped(
            StepEnded(at_s=at_s, step_id=1, group=Group(1, 0), seconds=0.1, tokens=[("a", 1)])
        )
    outcomes.ended(finished("a", end_s))
    assert outcomes.take_met() == num_met
    assert outcomes.take_met() == 0
