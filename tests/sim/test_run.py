"""Whole simulated runs against what can be worked out without one."""

import itertools
import random
from dataclasses import replace

import pytest

from nitsum.cost.protocol import FixedCost
from nitsum.events import EventLog, StepEnded, StepSent
from nitsum.kv.check import check
from nitsum.metrics.goodput import Window
from nitsum.metrics.report import build_report
from nitsum.plan import Lane
from nitsum.sim.run import Options, PlannedSwitch, SimResult, Simulation, simulate
from nitsum.step import BatchShape
from nitsum.workload.generate import generate
from nitsum.workload.items import WorkItem
from nitsum.workload.spec import ChainSpec, LengthsSpec, MixSpec, StreamSpec
from tests.sim.kit import item, small_system

EXACT = Options(host_latency_s=0.0)


def mix(seed: int = 0, **settings: object) -> MixSpec:
    lengths = LengthsSpec((20, 200), (1, 40))
    stream = StreamSpec(
        name="s",
        rate_per_s=10.0,
        lengths=lengths,
        tiers={"priority": 1, "default": 2, "batch": 1},
        **settings,  # type: ignore[arg-type]
    )
    return MixSpec(name="m", duration_s=5.0, streams=(stream,), seed=seed)


def run(system, items, options: Options = EXACT) -> tuple[SimResult, EventLog]:
    log = EventLog()
    return simulate(system, items, options=options, sink=log), log


@pytest.mark.parametrize("policy", ["fcfs", "priority", "nitsum"])
def test_the_same_run_twice_is_the_same_run(policy):
    def events(noise_seed: int) -> list[object]:
        system = small_system("TP2", "2xTP1", policy=policy, num_blocks=128)
        switches = (PlannedSwitch(2.0, "2xTP1"), PlannedSwitch(5.0, "TP2"))
        options = Options(noise=0.2, seed=noise_seed, switches=switches)
        return list(run(system, generate(mix()), options)[1].events)

    first = events(1)
    assert first == events(1)
    assert first != events(2)


@pytest.mark.parametrize("plan", ["TP2", "2xTP1", "TP2/2xTP1"])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "nitsum"])
def test_nothing_is_lost(plan, policy):
    items = list(generate(mix()))
    simulation = Simulation(
        small_system(plan, policy=policy, num_blocks=64, checks=True), items, options=EXACT
    )
    result = simulation.run()
    records = result.recorder.requests
    answered = [record for record in records.values() if record.outcome != "refused"]
    assert set(records) == {work.request_id for work in items}
    assert {record.outcome for record in answered} == {"length"}
    wanted = {work.request_id: work.num_output for work in items}
    assert all(record.num_output == wanted[record.request_id] for record in answered)
    tokens_out = sum(step.num_tokens_out for step in result.recorder.steps)
    assert tokens_out == sum(record.num_output for record in answered) > 200
    check(simulation.core.generation.kv)
    assert not simulation.core.generation.kv.tables


def test_steps_last_what_the_cost_model_says():
    cost = FixedCost(0.013, 2.5e-4)
    _, log = run(small_system("TP2", cost=cost), generate(mix()))
    sent = {event.step_id: event for event in log.events if isinstance(event, StepSent)}
    ended = [event for event in log.events if isinstance(event, StepEnded)]
    lane = Lane(small_system("TP2").config.plans.groups[0])
    assert len(ended) == len(sent) > 100
    for event in ended:
        step = sent[event.step_id]
        shape = BatchShape(step.num_decode, 0, step.prefill_tokens, 0, 0)
        assert event.seconds == pytest.approx(cost.step_time(lane, shape), rel=1e-9)


def test_lanes_of_an_overlay_take_turns_on_shared_ranks():
    cost = FixedCost(0.01, 1e-4)
    _, log = run(small_system("TP2/2xTP1", cost=cost, max_num_seqs=8), generate(mix()))
    sent = {event.step_id: event for event in log.events if isinstance(event, StepSent)}
    spans: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    groups = set()
    for event in log.events:
        if isinstance(event, StepEnded):
            step = sent[event.step_id]
            shape = BatchShape(step.num_decode, 0, step.prefill_tokens, 0, 0)
            start_s = event.at_s - cost.step_time(Lane(event.group), shape)
            groups.add(event.group)
            for rank in event.group.ranks:
                spans[rank].append((start_s, event.at_s))
    assert len(groups) == 3
    for of_rank in spans.values():
        of_rank.sort()
        overlaps = [b[0] - a[1] for a, b in itertools.pairwise(of_rank)]
        assert min(overlaps) > -1e-9


def test_a_switch_in_a_full_arena():
    items = [item(f"r{i}", 0.01 * i, 100, 120) for i in range(60)]
    system = small_system("TP2", "2xTP1", num_blocks=150, max_num_seqs=64, checks=True)
    switches = (PlannedSwitch(2.0, "2xTP1"), PlannedSwitch(4.0, "TP2"))
    result, _ = run(system, items, replace(EXACT, switches=switches))
    assert result.arena_max_share > 0.9
    assert [report.ok for report in result.reports] == [True, True]
    assert [report.to_plan for report in result.reports] == ["2xTP1", "TP2"]
    assert sum(wave.num_requests for report in result.reports for wave in report.waves) > 5
    assert sum(wave.bytes_moved for report in result.reports for wave in report.waves) > 0
    assert {r.outcome for r in result.recorder.requests.values()} == {"length"}


def test_one_server_and_one_queue():
    """Steps of one length, one request each: waits follow Lindley's recursion, M/D/1 in the mean.

    Mean wait of M/D/1: load / (2 (1 - load)) services.
    """
    rng, at_s, service_s, load = random.Random(5), 0.0, 0.1, 0.6
    items: list[WorkItem] = []
    for i in range(4000):
        at_s += rng.expovariate(load / service_s)
        items.append(item(f"r{i}", at_s, 10, 1))
    system = small_system(
        "TP1", cost=FixedCost(service_s, 0.0), num_ranks=1, max_num_seqs=1, prefix_cache=False
    )
    result, _ = run(system, items)
    wait_s, before_s, waits = 0.0, items[0].at_s, []
    for work in items:
        wait_s = max(0.0, wait_s + service_s - (work.at_s - before_s)) if waits else 0.0
        before_s = work.at_s
        waits.append(wait_s)
        record = result.recorder.requests[work.request_id]
        assert record.ttft_s == pytest.approx(wait_s + service_s, abs=1e-6)
    mean = sum(waits) / len(waits)
    assert mean == pytest.approx(load / (2 * (1 - load)) * service_s, rel=0.06)
    assert result.busy_share[0] == pytest.approx(load, rel=0.05)


def test_metrics_by_hand():
    """Two requests on one lane: 0.01 s a step and 1 ms a token.

    a: prefill of 100 at 0 .. 0.110, then two decodes alone, 0.011 each, and from then on beside b.
    b: arrives at 0.12, when a's second decode (0.121 .. 0.132) is already sent, so its prefill of
       50 with a's decode lasts 0.132 .. 0.193; its own decode is 0.193 .. 0.205 beside a's.
    """
    system = small_system("TP1", cost=FixedCost(0.01, 0.001), num_ranks=1, prefix_cache=False)
    result, _ = run(system, [item("a", 0.0, 100, 5), item("b", 0.12, 50, 2)])
    a, b = (result.recorder.requests[name] for name in "ab")
    assert list(a.token_times) == pytest.approx([0.110, 0.121, 0.132, 0.193, 0.205])
    assert list(b.token_times) == pytest.approx([0.193, 0.205])
    report = build_report(result.recorder, small_samples=True)
    assert report.window == Window(0.0, 0.12)
    default = report.tiers[0]
    assert default.ttft_s.max == pytest.approx(0.110)
    assert default.ttft_s.p50 == pytest.approx((0.110 + 0.073) / 2)
    assert default.tpot_s.max == pytest.approx((0.205 - 0.110) / 4)
    assert result.sim_s == pytest.approx(0.205, abs=0.02)


def test_calls_of_a_chain_follow_their_answers_and_find_their_prefix():
    spec = mix(chain=ChainSpec(calls=(3, 3), new_tokens=(30, 60), think_s=0.5, deadline_s=60.0))
    result, _ = run(small_system("TP2", num_blocks=4096), generate(spec))
    chains: dict[str, list] = {}
    for record in result.recorder.requests.values():
        chains.setdefault(record.chain_id, []).append(record)
    assert len(chains) > 20
    for calls in chains.values():
        assert [call.request_id.rsplit(".")[-1] for call in calls] == ["0", "1", "2"]
        for before, after in itertools.pairwise(calls):
            assert after.arrival_s >= before.finished_s
            history = before.num_prompt + before.num_output
            assert after.num_prompt > history
            assert history - 17 <= after.num_cached <= history


def test_what_cannot_be_done_in_time_counts_as_missed():
    items = [item(f"r{i}", 0.0, 100, 100) for i in range(50)]
    result, _ = run(small_system("TP2"), items, replace(EXACT, drain_s=1.0))
    assert result.num_unfinished > 0
    assert 1.0 <= result.sim_s < 2.0
    report = build_report(result.recorder, small_samples=True)
    assert report.tiers[0].num_unfinished == result.num_unfinished
