"""The added pause of a switch, by its definition."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.events import AnyEvent
from nitsum.metrics.records import Recorder
from nitsum.metrics.switches import (
    copy_slowdown_s,
    pauses,
    precopy_slowdown,
    summarise_switches,
)
from tests.unit.metrics.streams import TP1, in_order, life, step, switch

PLANS = ("2xTP1", "TP2")
BACK = ("TP2", "2xTP1")


def stream(
    name: str, pause_s: float, before_s: float = 0.05, after_s: float = 0.03
) -> list[AnyEvent]:
    """Tokens at a steady pace up to 10 s, one pause, a steady pace up to 20 s."""
    before = [before_s * i for i in range(1, round(10 / before_s) + 1)]
    resume = before[-1] + pause_s
    after = [resume + after_s * i for i in range(round(10 / after_s))]
    return life(name, 0.0, [*before, *after])


def added(events: Sequence[AnyEvent]) -> dict[str, float]:
    run = Recorder(events)
    found, _ = pauses(run.switches, run.requests.values())
    return {pause.request_id: pause.added_s for pause in found}


@given(st.floats(0.06, 2.0))
def test_the_pause_is_what_exceeds_the_larger_median(pause_s: float) -> None:
    waves = switch("s", PLANS, [(9.9, 10.02, ["a"])])
    found = added(in_order(stream("a", pause_s), waves))
    assert found["a"] == pytest.approx(pause_s - 0.05, abs=1e-6)


def test_a_smooth_switch_adds_nothing() -> None:
    waves = switch("s", PLANS, [(9.9, 10.02, ["a"])])
    assert added(in_order(stream("a", 0.03), waves))["a"] == pytest.approx(0.0, abs=1e-9)


def test_a_gap_that_starts_within_100_ms_of_the_commit_counts() -> None:
    soon = switch("s", PLANS, [(9.0, 9.95, ["a"])])
    assert added(in_order(stream("a", 0.5), soon))["a"] == pytest.approx(0.45)
    late = switch("s", PLANS, [(9.0, 9.8, ["a"])])
    assert added(in_order(stream("a", 0.5), late))["a"] == pytest.approx(0.0, abs=1e-9)


def test_moved_streams_are_judged_over_their_own_wave_bystanders_over_all() -> None:
    waves = switch("s", PLANS, [(5.0, 6.0, ["a"]), (9.5, 10.2, ["b"])])
    found = added(in_order(*(stream(name, 0.4) for name in "abc"), waves))
    assert found["a"] == pytest.approx(0.0, abs=1e-9)
    assert found["b"] == pytest.approx(0.35)
    assert found["c"] == pytest.approx(0.35)


def test_streams_that_do_not_run_across_are_not_counted() -> None:
    waves = switch("s", PLANS, [(9.9, 10.1, [])])
    early = life("early", 0.0, [0.1 * i for i in range(1, 50)])
    late = life("late", 10.5, [10.6 + 0.1 * i for i in range(20)])
    assert added(in_order(early, late, waves)) == {}


def test_streams_with_too_few_tokens_on_a_side_are_reported_as_unjudged() -> None:
    waves = switch("s", PLANS, [(9.9, 10.1, ["a"])])
    run = Recorder(in_order(life("a", 0.0, [9.7, 9.8, 10.3, 10.4, 10.5, 10.6, 10.7]), waves))
    found, unjudged = pauses(run.switches, run.requests.values())
    assert found == []
    assert unjudged == {"s": 1}


def test_medians_stop_at_the_neighbouring_switches() -> None:
    """Slow before the first switch: that layout says nothing about the second."""
    times = [0.5 * i for i in range(1, 20)]  # to 9.5 s, in the oldest layout
    times += [9.6 + 0.01 * i for i in range(1040)]  # to 20 s
    times += [20.2 + 0.01 * i for i in range(500)]  # a pause of 0.21 s
    first = switch("s1", PLANS, [(9.4, 9.55, ["a"])])
    second = switch("s2", BACK, [(19.9, 20.1, ["a"])])
    run = Recorder(in_order(life("a", 0.0, times), first, second))
    found, _ = pauses(run.switches, run.requests.values())
    by_switch = {pause.op_id: pause for pause in found}
    assert by_switch["s2"].median_gap_s == pytest.approx(0.01, rel=1e-3)
    assert by_switch["s2"].added_s == pytest.approx(20.2 - (9.6 + 10.39) - 0.01, rel=1e-3)


def test_tokens_that_came_together_are_one() -> None:
    times = [0.1 * (i // 2) for i in range(2, 400)]
    waves = switch("s", PLANS, [(9.9, 10.1, ["a"])])
    assert added(in_order(life("a", 0.0, times), waves))["a"] == pytest.approx(0.0, abs=1e-9)


def test_directions_are_summed_up_apart() -> None:
    there = [switch(f"t{i}", PLANS, [(10.0 * i, 10.0 * i + 1, [])], 100) for i in (1, 3, 5)]
    back = [switch(f"b{i}", BACK, [(10.0 * i, 10.0 * i + 2, [])], 300) for i in (2, 4)]
    times = [0.1 * i for i in range(1, 700)]
    run = Recorder(in_order(*there, *back, life("a", 0.0, times)))
    to_tp2, to_tp1 = summarise_switches(run.switches, run.requests.values(), run.steps)
    assert (to_tp2.from_plan, to_tp2.num_switches, to_tp1.num_switches) == ("2xTP1", 3, 2)
    assert (to_tp2.duration_s.p50, to_tp1.duration_s.p50) == (1.0, 2.0)
    assert to_tp1.bytes_moved.mean == 300
    assert to_tp2.added_pause_s.num == 3
    assert to_tp2.added_pause_s.p99 is None


def test_an_abandoned_switch_is_no_switch() -> None:
    events = switch("s", PLANS, [(1.0, 2.0, [])])[:-1]
    run = Recorder(events)
    assert summarise_switches(run.switches, [], []) == []


def test_how_much_steps_slow_during_precopy() -> None:
    calm = [step(1.0 + 0.1 * i, "a", seconds=0.02) for i in range(20)]
    copying = [step(3.05 + 0.1 * i, "a", seconds=0.03) for i in range(9)]
    prefill = step(3.5, "b", seconds=0.5, prefill_tokens=512)
    waves = switch("s", PLANS, [(3.0, 4.0, [])])
    run = Recorder(in_order(*calm, *copying, prefill, waves))
    assert precopy_slowdown(run.switches[0], run.steps) == pytest.approx(1.5)
    assert precopy_slowdown(run.switches[0], run.steps[:3]) is None
    assert run.steps[0].group == TP1


def test_gaps_of_the_load_itself_are_told_apart() -> None:
    """A gap as long before the switch, in as long a time, is none of the switch's."""
    times = [0.05 * i for i in range(1, 190)]  # to 9.45 s
    times += [9.65 + 0.05 * i for i in range(200)]  # a gap of 0.2 s before 9.8
    waves = switch("s", PLANS, [(9.8, 10.0, ["a"])])
    run = Recorder(in_order(life("a", 0.0, times), waves))
    (pause,), _ = pauses(run.switches, run.requests.values())
    assert pause.added_s == pytest.approx(0.0, abs=1e-9)
    assert pause.before_s == pytest.approx(0.15)
    young = Recorder(in_order(life("a", 0.0, times[189:]), waves))
    (pause,), _ = pauses(young.switches, young.requests.values())
    assert pause.before_s is None


def test_steps_beside_copies_are_compared_with_steps_of_their_size() -> None:
    """Long steps before the switch, short ones in it and right after it."""
    full = [step(1.0 + 0.1 * i, "a", seconds=0.04, prefill_tokens=960) for i in range(19)]
    copying = [step(3.05 + 0.1 * i, "a", seconds=0.023, prefill_tokens=450) for i in range(9)]
    after = [step(4.01 + 0.02 * i, "a", seconds=0.02, prefill_tokens=470) for i in range(5)]
    waves = switch("s", PLANS, [(3.0, 4.0, [])])
    run = Recorder(in_order(*full, *copying, *after, waves))
    found = copy_slowdown_s(run.switches[0], run.switches, run.steps)
    assert found == pytest.approx(0.003)
    assert copy_slowdown_s(run.switches[0], run.switches, run.steps[:19]) is None
    assert copy_slowdown_s(run.switches[0], run.switches, run.steps[:28]) is None
