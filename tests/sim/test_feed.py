"""Hashes instead of tokens, and workloads from a few words."""

import pytest

from nitsum.cost.protocol import FixedCost
from nitsum.errors import ConfigError
from nitsum.metrics.records import Recorder
from nitsum.metrics.targets import Targets, TierRule
from nitsum.plan import Lane
from nitsum.sim.feed import Feed, block_hashes
from nitsum.sim.replay import compare, items_of, pair_figures, step_pairs
from nitsum.sim.run import Options, simulate
from nitsum.sim.source import read_source
from nitsum.step import BatchShape
from nitsum.workload.generate import generate
from nitsum.workload.items import Segment, WorkItem
from tests.sim.kit import item, small_system


def prompt(*segments: Segment) -> WorkItem:
    return WorkItem("r", 0.0, 4, "default", "t", segments)


SYSTEM = Segment("system", 40, shared=True)


def test_shared_segments_hash_alike_and_what_follows_apart():
    first = block_hashes(prompt(SYSTEM, Segment("a", 30)), [], 16)
    second = block_hashes(prompt(SYSTEM, Segment("b", 30)), [], 16)
    assert len(first) == len(second) == 4
    assert first[:2] == second[:2]  # 32 of the 40 shared tokens
    assert not set(first[2:]) & set(second[2:])
    assert len(set(first)) == 4


def test_the_same_segment_after_another_start_is_another_prefix():
    plain = block_hashes(prompt(SYSTEM), [], 16)
    later = block_hashes(prompt(Segment("a", 16), SYSTEM), [], 16)
    assert not set(plain) & set(later)


def test_a_short_segment_still_counts_for_what_follows():
    first = block_hashes(prompt(Segment("a", 5), SYSTEM), [], 16)
    second = block_hashes(prompt(Segment("b", 5), SYSTEM), [], 16)
    assert not set(first) & set(second)


def test_arrivals_come_in_order_and_not_before_their_time():
    feed = Feed([item("a", 0.5, 10, 1), item("b", 0.7, 10, 1)], 16, None)
    assert feed.next_s == 0.5
    assert [work.request_id for work, _ in feed.due(0.6)] == ["a"]
    assert feed.next_s == 0.7
    assert [request.arrival_s for _, request in feed.due(0.7)] == [0.7]
    assert feed.next_s == float("inf")


def test_a_served_run_replayed_under_the_same_conditions_shows_no_error():
    spec = read_source("synthetic:azure_code", rate_per_s=4.0, duration_s=10.0)
    system = small_system("TP2", prefix_cache=False, num_blocks=4096)
    served = simulate(system, generate(spec), options=Options()).recorder
    start_s = min(record.arrival_s for record in served.requests.values())
    for record in served.requests.values():  # a run on another clock, as real ones are
        record.arrival_s += 100.0
        record.token_times = type(record.token_times)("d", (t + 100.0 for t in record.token_times))
    again = simulate(system, items_of(served), options=Options()).recorder
    pairs = compare(served, again)
    times = ["ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s"]
    assert [pair.name for pair in pairs] == [*times, "goodput_per_s"]
    assert all(pair.num_samples > 20 for pair in pairs)
    assert all(abs(pair.error) < 1e-6 for pair in pairs)
    assert min(r.arrival_s for r in again.requests.values()) == pytest.approx(0.0)
    assert start_s > 0.0
    assert pair_figures(pairs)["sim_error_ttft_p99"] == pytest.approx(0.0, abs=1e-6)


def test_requests_that_were_not_answered_in_time_are_load_all_the_same():
    """Left out, the simulated machine would have had less to do than the served one."""
    system = small_system("TP2", prefix_cache=False)
    items = [item(f"r{i}", 0.001 * i, 64, 8) for i in range(60)]
    whole = simulate(system, items).recorder
    served = simulate(system, items).recorder
    for number in range(30, 60):  # the run was ended before these had
        record = served.requests[f"r{number}"]
        record.outcome = "abort" if number % 2 else "unfinished"
        del record.token_times[number // 10 :]
        if number % 3 == 0:
            del record.token_times[:]
    again = simulate(system, items_of(served)).recorder
    assert set(again.requests) == set(whole.requests)
    assert again.requests["r29"].ttft_s == pytest.approx(whole.requests["r29"].ttft_s, abs=0.002)
    assert again.requests["r35"].num_output == 3  # as far as it came
    assert again.requests["r33"].num_output == 8  # nothing is known of it but its bound
    *times, goodput = compare(served, again)
    assert {pair.num_samples for pair in times} == {30}
    assert goodput.num_samples == 45  # what clients broke off is nobody's success or failure


def test_errors_are_told_by_tier_too_where_there_are_several():
    """Latencies of all together are those of the tier that waits longest."""
    system = small_system("TP2", prefix_cache=False)
    tiers = ("priority", "default")
    items = [item(f"r{i}", 0.01 * i, 64, 8, tier=tiers[i % 2]) for i in range(40)]
    served, twin = (simulate(system, items).recorder for _ in range(2))
    for record in twin.requests.values():
        if record.tier_asked == "default":
            shifted = (time_s + 1.0 for time_s in record.token_times)
            record.token_times = type(record.token_times)("d", shifted)
    errors = {pair.name: pair.error for pair in compare(served, twin)}
    assert errors["priority_ttft_p99_s"] == 0.0
    assert errors["default_ttft_p99_s"] > 0.5
    assert errors["ttft_p99_s"] > 0.5
    assert {pair.num_samples for pair in compare(served, twin)} == {20, 40}


def test_goodput_counts_requests_that_only_the_twin_answered_as_missed():
    items = [item(f"r{i}", float(i), 64, 8) for i in range(8)]
    system = small_system("TP2", prefix_cache=False)
    held = Targets(source="t", prefill=[(1, 9.9), (2, 9.9)], tiers={"default": TierRule(9.9, 9.9)})
    served, twin = (simulate(system, items, targets=held).recorder for _ in range(2))
    served.requests["r3"].outcome = "unfinished"
    goodput = compare(served, twin)[-1]
    assert goodput.num_samples == 8
    assert goodput.simulated / goodput.served == pytest.approx(8 / 7)


def test_a_slower_machine_shows_as_an_error():
    fast = small_system("TP2", prefix_cache=False)
    items = [item(f"r{i}", float(i), 64, 8) for i in range(8)]
    served = simulate(fast, items).recorder
    noisy = simulate(fast, items, options=Options(host_latency_s=0.02)).recorder
    errors = {pair.name: pair.error for pair in compare(served, noisy)}
    assert errors["ttft_p50_s"] > 0.5
    assert compare(served, Recorder()) == []
    late = compare(served, noisy, warmup_s=4.5)
    assert {pair.num_samples for pair in late} == {3}
    with pytest.raises(ConfigError, match="nothing to compare"):
        list(items_of(Recorder()))


def test_goodput_of_twins_is_judged_by_the_served_requests_targets():
    items = [item(f"r{i}", float(i), 64, 8) for i in range(8)]
    system = small_system("TP2", prefix_cache=False)
    easy, strict = (
        Targets(source="t", prefill=[(1, 0.1), (2, 0.1)], tiers={"default": TierRule(10.0, tpot_s)})
        for tpot_s in (1.0, 1e-9)
    )
    served, twin = (simulate(system, items, targets=held).recorder for held in (easy, strict))
    goodput = compare(served, twin)[-1]
    assert goodput.name == "goodput_per_s"
    assert goodput.served > 0.9
    assert goodput.error == 0.0
    assert compare(served, twin, targets=strict)[-1].served == 0.0


def test_steps_of_an_engine_are_laid_beside_the_cost_model():
    system = small_system("TP2", prefix_cache=False)
    items = [item(f"r{i}", 2.0 * i, 64, 8) for i in range(4)]
    served = simulate(system, items).recorder
    found = step_pairs(served, system.cost)
    kinds = [(pair.degree, pair.kind, pair.num_steps) for pair in found]
    assert kinds == [(2, "decode", 28), (2, "prefill", 4)]
    assert all(abs(pair.error) < 1e-9 for pair in found)
    for step in served.steps:
        step.seconds *= 2.0
    assert all(pair.error == pytest.approx(-0.5) for pair in step_pairs(served, system.cost))


def test_steps_of_prompts_and_decodes_are_laid_beside_the_cost_model_to_the_token():
    """Events hold one sum of contexts; what belongs to decodes follows from the answers."""
    cost = _ByContext()
    system = small_system("TP2", cost=cost, prefix_cache=False)
    served = simulate(system, [item(f"r{i}", 0.05 * i, 64 + i, 16) for i in range(8)]).recorder
    found = {pair.kind: pair for pair in step_pairs(served, cost)}
    assert found["mixed"].num_steps > 3
    assert all(abs(pair.error) < 1e-9 for pair in found.values())


class _ByContext(FixedCost):
    """A token of context costs a decode a hundred times what it costs a prompt."""

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        context_s = 1e-4 * batch.decode_context_tokens + 1e-6 * batch.prefill_context_tokens
        return super().step_time(lane, batch) + context_s


def test_words_become_workloads(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:00:00.0,100,5\n2023-11-16 18:00:08.0,200,6\n"
    )
    items = list(generate(read_source(str(trace), rate_per_s=4.0, tiers={"batch": 1.0})))
    assert [(work.at_s, work.num_prompt, work.tier) for work in items] == [
        (0.0, 100, "batch"),
        (2.0, 200, "batch"),
    ]
    assert read_source("mix:flip", duration_s=200.0).phases[-1].at_s == 150.0
    assert read_source("mix:calm").duration_s == 600.0
    with pytest.raises(ConfigError, match=r"synthetic:LENGTHS"):
        read_source("nowhere.csv")
    with pytest.raises(ConfigError, match=r"azure_code"):
        list(generate(read_source("synthetic:unheard")))


def test_latencies_count_from_the_arrival_before_the_front_door():
    system = small_system("TP2", prefix_cache=False)
    items = [item(f"r{i}", 4.0 * i, 64, 8) for i in range(2)]
    plain, late = (
        simulate(system, items, options=Options(front_door_s=delay_s)).recorder.requests
        for delay_s in (0.0, 0.25)
    )
    for name, record in plain.items():
        assert late[name].arrival_s == record.arrival_s
        assert late[name].ttft_s == pytest.approx((record.ttft_s or 0.0) + 0.25)
        assert late[name].tpot_s == pytest.approx(record.tpot_s)
