"""Targets, goodput, chains and fairness, against answers known by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.protocol import FixedCost
from nitsum.cost.shapes import SHAPES
from nitsum.errors import ConfigError
from nitsum.events import AnyEvent, Refused
from nitsum.metrics.fairness import merged, service_gaps
from nitsum.metrics.goodput import (
    Attainment,
    Window,
    arrival_window,
    attainment,
    chains,
    judged,
    met,
)
from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.metrics.targets import (
    Target,
    Targets,
    TierRule,
    default_targets,
    load_targets,
    own_target,
    promised,
    save_targets,
)
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape
from tests.unit.metrics.streams import arrived, finished, in_order, life, step


def record_of(ttft_s: float, gap_s: float, num_tokens: int = 3) -> RequestRecord:
    times = [ttft_s + i * gap_s for i in range(num_tokens)]
    return Recorder(life("a", 0.0, times)).requests["a"]


def test_all_targets_must_hold() -> None:
    record = record_of(ttft_s=1.0, gap_s=0.5)
    assert met(record, Target(1.0, 0.5))
    assert not met(record, Target(0.9, 0.5))
    assert not met(record, Target(1.0, 0.4))
    assert met(record, Target(deadline_s=2.0))
    assert not met(record, Target(1.0, 0.5, deadline_s=1.9))


def test_one_token_meets_any_tpot() -> None:
    assert met(record_of(1.0, 0.0, num_tokens=1), Target(1.0, 0.001))


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_only_answers_count(reason: str) -> None:
    run = Recorder([arrived("a", 0.0), *step(1.0, "a"), finished("a", 1.0, reason=reason)])
    assert not met(run.requests["a"], Target())


def run_of_ten() -> Recorder:
    """One arrival a second from 0 to 9; the i-th has its first token after i * 0.1 s."""
    lives = [
        life(f"r{i}", float(i), [i + 0.1 * i, i + 0.1 * i + 0.05], ttft_target_s=0.45)
        for i in range(10)
    ]
    return Recorder(in_order(*lives))


def test_goodput_is_requests_within_targets_over_time() -> None:
    records = list(run_of_ten().requests.values())
    window = arrival_window(records)
    reached = attainment(judged(records, window), window, own_target)
    assert (reached.num_requests, reached.num_met) == (10, 5)
    assert reached.goodput_per_s == pytest.approx(5 / 9)
    assert reached.share == pytest.approx(0.5)


def test_warmup_leaves_early_arrivals_out() -> None:
    records = list(run_of_ten().requests.values())
    window = arrival_window(records, warmup_s=3.0)
    reached = attainment(judged(records, window), window, own_target)
    assert (reached.num_requests, reached.num_met) == (7, 2)
    assert reached.goodput_per_s == pytest.approx(2 / 6)


def test_refused_and_unfinished_requests_count_as_missed_aborted_ones_not_at_all() -> None:
    events = [
        arrived("late", 1.0, ttft_target_s=1.0),
        Refused(at_s=2.0, request_id="no", tier="flex", code="rate_limit_exceeded"),
        arrived("gone", 3.0),
        finished("gone", 3.5, reason="abort"),
    ]
    records = list(Recorder(events).requests.values())
    window = Window(0.0, 10.0)
    reached = attainment(judged(records, window), window, own_target)
    assert (reached.num_requests, reached.num_met) == (2, 0)


def test_a_tier_that_was_held_to_nothing_is_not_judged() -> None:
    """All of it would be in time. Where nothing but refusals is known, they are missed."""
    lives = [
        life("free", 0.0, [0.5], tier="own", tier_asked="own"),
        life("held", 1.0, [1.5], ttft_target_s=0.4),
        [Refused(at_s=2.0, request_id="no", tier="flex", code="over_capacity")],
    ]
    records = list(Recorder(in_order(*lives)).requests.values())
    window = Window(0.0, 10.0)
    assert attainment(records, window, own_target) == Attainment(3, 2, 0, 10.0)
    free = attainment(records[:1], window, own_target)
    assert (free.share, free.goodput_per_s) == (None, None)


@pytest.mark.parametrize(
    ("tier", "target"),
    [
        ("priority", Target(0.3, 0.05)),
        ("fast", Target(0.3, 0.05)),
        ("auto", Target(2.0, 0.1)),
        ("batch", Target(deadline_s=1800.0)),
        ("gold", Target()),
    ],
)
def test_what_a_tier_promises_by_default(tier: str, target: Target) -> None:
    assert promised(tier) == target


def test_nothing_arrived() -> None:
    window = arrival_window([])
    reached = attainment([], window, own_target)
    assert (reached.share, reached.goodput_per_s) == (None, None)


# --- targets --------------------------------------------------------------------------------------


def test_the_default_rule_against_a_cost_known_by_hand() -> None:
    """10 ms a step and 0.1 ms a token: prefill of n takes 10 ms + n / 10 ms."""
    targets = default_targets(FixedCost(0.01, 1e-4), 1, "fake")
    assert targets.of("priority", 1000).ttft_s == pytest.approx(3 * 0.11)
    assert targets.of("default", 1000).ttft_s == pytest.approx(10 * 0.11)
    assert targets.of("priority", 10).ttft_s == 0.1
    assert targets.of("priority", 10).tpot_s == pytest.approx(1.5 * 0.0101)
    assert targets.of("default", 10).tpot_s == pytest.approx(0.0228)
    assert targets.of("flex", 10) == Target(deadline_s=600.0)
    assert targets.of("batch", 10) == Target(deadline_s=1800.0)
    assert targets.of("priority", 300_000).ttft_s == pytest.approx(3 * 30.01)


def test_targets_follow_the_model_between_its_points() -> None:
    cost = AnalyticCost(SHAPES["Llama-3.1-8B"], Machine.parse("2xH100"))
    targets = default_targets(cost, 1, "Llama-3.1-8B on H100")
    for n in (700, 1155, 5000, 30_000):
        lone_s = cost.step_time(Lane(Group(1, 0)), BatchShape(0, 0, n, n * (n + 1) // 2, 1))
        assert targets.prefill_s(n) == pytest.approx(lone_s, rel=0.03)


def test_k_scales_ttft_only() -> None:
    targets = default_targets(FixedCost(), 1, "fake").with_k(2.0)
    assert targets.of("priority", 1000).ttft_s == pytest.approx(6 * 0.11)
    assert targets.of("priority", 1000).tpot_s == pytest.approx(1.5 * 0.0101)
    assert targets.of("flex", 1) == Target(deadline_s=600.0)


@given(st.integers(1, 200_000), st.integers(0, 10_000))
def test_longer_prompts_have_no_less_time(num_prompt: int, more: int) -> None:
    targets = default_targets(FixedCost(), 1, "fake")
    assert targets.prefill_s(num_prompt) <= targets.prefill_s(num_prompt + more)


def test_targets_are_committed_as_a_file(tmp_path: Path) -> None:
    targets, path = default_targets(FixedCost(), 1, "fake"), tmp_path / "targets.json"
    save_targets(targets, path)
    assert load_targets(path) == targets
    save_targets(msgspec.structs.replace(targets, prefill=[(1, 0.1)]), path)
    with pytest.raises(ConfigError, match="two rising lengths"):
        load_targets(path)
    path.write_text('{"source": "x"}')
    with pytest.raises(ConfigError, match="prefill"):
        load_targets(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_targets(tmp_path / "none.json")


def test_a_downgrade_does_not_lower_the_bar() -> None:
    targets = Targets(
        source="test",
        prefill=[(1, 0.1), (1000, 0.1)],
        tiers={"priority": TierRule(k=2.0), "default": TierRule(k=20.0)},
    )
    run = Recorder(life("a", 0.0, [1.0], tier_asked="priority", tier="default"))
    assert not met(run.requests["a"], targets.of_record(run.requests["a"]))
    with pytest.raises(ConfigError, match="flex"):
        targets.of("flex", 1)


# --- chains ---------------------------------------------------------------------------------------


def test_chains_are_judged_as_wholes() -> None:
    def call(name: str, chain: str, at_s: float, end_s: float) -> list[AnyEvent]:
        return life(name, at_s, [end_s], chain_id=chain, chain_deadline_s=10.0)

    events = in_order(
        call("a0", "a", 1.0, 3.0),
        call("a1", "a", 4.0, 9.0),
        call("b0", "b", 0.0, 2.0),
        call("b1", "b", 3.0, 11.0),
        [arrived("c0", 5.0, chain_id="c", chain_deadline_s=10.0)],
        life("alone", 0.0, [1.0]),
    )
    found = {chain.chain_id: chain for chain in chains(Recorder(events).requests.values())}
    assert list(found) == ["b", "a", "c"]
    assert (found["a"].latency_s, found["a"].met_deadline, found["a"].num_calls) == (8.0, True, 2)
    assert (found["b"].latency_s, found["b"].met_deadline) == (11.0, False)
    assert (found["c"].latency_s, found["c"].met_deadline) == (None, False)


# --- fairness -------------------------------------------------------------------------------------


def test_the_service_gap_of_two_backlogged_tenants() -> None:
    """Both wait all the time; in each 10 s acme gets 3 tokens and zeta 1."""
    acme = [3.0, 5.0, 7.0, 13.0, 15.0, 17.0]
    zeta = [4.0, 14.0]
    events = in_order(
        life("a", 0.0, acme, start_s=0.0, tenant="acme", num_prompt=0),
        life("z", 0.0, zeta, start_s=0.0, tenant="zeta", num_prompt=0),
        [arrived("a2", 0.0, tenant="acme"), arrived("z2", 0.0, tenant="zeta")],
        [arrived("idle", 0.0, tenant="other"), finished("idle", 0.5, reason="abort")],
    )
    (gap,) = service_gaps(Recorder(events).requests.values(), Window(0.0, 20.0))
    assert (gap.tier, gap.num_intervals) == ("default", 2)
    assert (gap.mean_gap, gap.max_gap) == (4.0, 4.0)
    assert gap.mean_ratio == pytest.approx(1 / 3)


def test_a_tenant_without_backlog_is_not_wronged() -> None:
    events = in_order(
        life("a", 0.0, [3.0, 5.0], tenant="acme"),
        [arrived("a2", 0.0, tenant="acme")],
        life("z", 8.0, [9.0], tenant="zeta"),
    )
    assert service_gaps(Recorder(events).requests.values(), Window(0.0, 20.0)) == []


spans = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 10)).map(lambda s: (s[0], s[0] + s[1])),
    max_size=20,
)


@given(spans)
def test_merged_spans_cover_the_same_seconds(pairs: list[tuple[int, int]]) -> None:
    union = merged([(float(a), float(b)) for a, b in pairs])
    covered = {second for a, b in pairs for second in range(a, b)}
    assert sum(b - a for a, b in union) == len(covered)
    assert all(left[1] < right[0] for left, right in pairwise(union))
