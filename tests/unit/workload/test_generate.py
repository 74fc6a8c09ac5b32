"""Mixes: what is asked for arrives, again and again the same."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.errors import ConfigError
from nitsum.workload.generate import generate
from nitsum.workload.items import WorkItem
from nitsum.workload.lengths import Quantiles, length_tables, lengths_named
from nitsum.workload.spec import load_mix, read_mix, scaled

MIXES = ("agents", "burst", "calm", "flip", "gentle")
CHAT: dict[str, Any] = {
    "name": "chat",
    "rate_per_s": 10,
    "lengths": "azure_conversation",
    "clients": 4,
    "tiers": {"priority": 1, "default": 3},
    "tenants": {"acme": 2, "zeta": 1},
}


def mix(*streams: dict[str, Any], **fields: Any) -> list[WorkItem]:
    content = {"name": "test", "duration_s": 200, "streams": list(streams), **fields}
    return list(generate(read_mix(content)))


def test_rates_tiers_and_tenants_are_as_asked() -> None:
    items = mix(CHAT)
    assert len(items) == pytest.approx(2000, rel=0.1)
    tiers, tenants = Counter(i.tier for i in items), Counter(i.tenant for i in items)
    assert tiers["priority"] / len(items) == pytest.approx(0.25, abs=0.04)
    assert tenants["acme"] / len(items) == pytest.approx(0.667, abs=0.05)
    assert [i.at_s for i in items] == sorted(i.at_s for i in items)
    assert len({i.request_id for i in items}) == len(items)


def test_lengths_follow_their_percentiles() -> None:
    items, table = mix(CHAT), lengths_named("azure_conversation")
    prompts = sorted(i.num_prompt for i in items)
    for share in (0.25, 0.5, 0.9):
        low, high = table.prompt.at(share - 0.06), table.prompt.at(share + 0.06)
        assert low <= prompts[int(share * len(prompts))] <= high
    mean_output = statistics.fmean(i.num_output for i in items)
    assert mean_output == pytest.approx(table.output.mean, rel=0.1)


@given(st.lists(st.floats(0, 1e5), min_size=2, max_size=101), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise_and_stay_inside(values: list[float], a: float, b: float) -> None:
    quantiles = Quantiles(tuple(sorted(values)))
    low, high = sorted((a, b))
    slack = 1e-9 * max(values)
    assert quantiles.at(low) <= quantiles.at(high) + slack
    assert min(values) - slack <= quantiles.at(a) <= max(values) + slack


def test_every_packaged_table_names_its_source_and_licence() -> None:
    for name, table in length_tables().items():
        assert table.source, name
        assert table.licence in {"CC-BY 4.0", "Apache-2.0", "MIT"}
        assert len(table.lengths.prompt.values) == len(table.lengths.output.values) == 101


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_items(seed: int) -> None:
    first = mix(CHAT, seed=seed, duration_s=10)
    assert first == mix(CHAT, seed=seed, duration_s=10)
    assert first != mix(CHAT, seed=seed + 1, duration_s=10)


def test_a_new_stream_does_not_change_the_others() -> None:
    code = {"name": "code", "rate_per_s": 3, "lengths": "azure_code"}
    alone = mix(CHAT, duration_s=20)
    assert [i for i in mix(CHAT, code, duration_s=20) if i.request_id.startswith("chat")] == alone


def test_scaling_changes_the_rate_and_nothing_else() -> None:
    spec = load_mix("calm")
    few, many = len(list(generate(spec))), len(list(generate(scaled(spec, 3.0))))
    assert many == pytest.approx(3 * few, rel=0.1)
    with pytest.raises(ConfigError, match="positive"):
        scaled(spec, 0.0)


def test_phases_change_the_mix() -> None:
    items = list(generate(load_mix("flip")))

    def share_urgent(low: float, high: float) -> float:
        inside = [i for i in items if low <= i.at_s < high]
        return sum(i.tier == "priority" for i in inside) / len(inside)

    assert share_urgent(0, 150) > 0.8
    assert share_urgent(150, 300) < 0.1
    assert share_urgent(300, 450) > 0.8


@pytest.mark.parametrize("name", MIXES)
def test_packaged_mixes_generate(name: str) -> None:
    items = list(itertools.islice(generate(load_mix(name)), 300))
    assert len(items) == 300
    assert all(i.num_prompt >= 1 and i.num_output >= 1 for i in items)


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_have_their_length_and_stay_in_the_vocabulary() -> None:
    for item in mix(CHAT, duration_s=5):
        prompt = item.prompt(1000)
        assert len(prompt) == item.num_prompt
        assert min(prompt) >= 16
        assert max(prompt) < 1000
        assert prompt == item.prompt(1000)


def test_tenants_share_a_system_prompt_and_nothing_more() -> None:
    items = mix({**CHAT, "shared_prefix_tokens": 64}, duration_s=20)
    long = [i for i in items if i.num_prompt > 100]
    acme = [i.prompt(5000) for i in long if i.tenant == "acme"][:5]
    zeta = next(i.prompt(5000) for i in long if i.tenant == "zeta")
    assert all(p[:64] == acme[0][:64] for p in acme)
    assert acme[0][64:96] != acme[1][64:96]
    assert zeta[:64] != acme[0][:64]


def test_requests_carry_what_the_engine_needs() -> None:
    item = mix(CHAT, duration_s=5)[0]
    request = item.request(500, start_s=100.0)
    assert request.arrival_s == 100.0 + item.at_s
    assert request.tier == request.tier_asked == item.tier
    assert request.sampling.max_tokens == item.num_output
    assert request.sampling.stop_token_ids == ()


# --- chains ---------------------------------------------------------------------------------------

AGENT: dict[str, Any] = {
    "name": "agent",
    "rate_per_s": 1,
    "lengths": {"prompt": [100, 200], "output": [10, 20]},
    "chain": {"calls": [5, 10], "new_tokens": [30, 60], "think_s": 0.5, "deadline_s": 60},
}


def played(item: WorkItem, answer_s: float = 1.0) -> list[WorkItem]:
    """Runs a chain to its end with made-up answers."""
    calls = [item]
    while True:
        last = calls[-1]
        output = list(range(last.num_output))
        following = last.following(last.at_s + answer_s, last.prompt(500), output)
        if following is None:
            return calls
        calls.append(following)


def test_each_call_extends_the_last() -> None:
    for first in mix(AGENT, duration_s=30):
        calls = played(first)
        assert 5 <= len(calls) <= 10
        for before, after in itertools.pairwise(calls):
            conversation = before.prompt(500) + list(range(before.num_output))
            assert after.prompt(500)[: len(conversation)] == conversation
            assert 30 <= after.num_prompt - len(conversation) <= 60
            assert after.at_s >= before.at_s + 1.0
        assert [c.call for c in calls] == list(range(len(calls)))
        assert len({c.request_id for c in calls}) == len(calls)


def test_a_chain_keeps_one_deadline() -> None:
    calls = played(mix(AGENT, duration_s=10)[0])
    requests = [call.request(500, start_s=7.0) for call in calls]
    assert {r.chain_deadline_s for r in requests} == {7.0 + calls[0].at_s + 60}
    assert {r.chain_id for r in requests} == {calls[0].chain and calls[0].chain.chain_id}


def test_chains_and_requests_end_before_the_limit() -> None:
    for item in mix(AGENT, CHAT, duration_s=30, max_total_tokens=400):
        for call in played(item):
            assert call.num_prompt + call.num_output <= 400
            assert call.num_prompt >= 1
            assert call.num_output >= 1


def test_a_request_without_a_chain_has_nothing_after_it() -> None:
    item = mix(CHAT, duration_s=5)[0]
    assert item.following(1.0, [1], [2]) is None


# --- replay ---------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [
        {
            "timestamp": 1000 * t,
            "input_length": 1100,
            "output_length": 4,
            "hash_ids": [1, 2 + t, 99],
        }
        for t in range(20)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_replays_share_what_the_trace_shares(trace: Path) -> None:
    items = mix({"name": "t", "trace": str(trace)}, duration_s=10)
    assert [i.at_s for i in items] == [float(t) for t in range(10)]
    first, second = items[0].prompt(50_000), items[1].prompt(50_000)
    assert len(first) == 1100
    assert first[:512] == second[:512]
    assert first[512:520] != second[512:520]
    assert first[1024:] == second[1024:]


def test_replays_start_speed_up_and_shrink(trace: Path) -> None:
    stream = {"name": "t", "trace": str(trace), "start_s": 4, "speed": 2, "length_scale": 0.1}
    items = mix(stream, duration_s=3)
    assert [i.at_s for i in items] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert items[0].num_prompt == 110
    assert [len(s.key) > 0 and s.num_tokens for s in items[0].segments] == [51, 51, 8]


# --- files ----------------------------------------------------------------------------------------


def test_a_mix_finds_its_trace_beside_it(trace: Path) -> None:
    path = trace.parent / "mix.yaml"
    path.write_text("{name: m, duration_s: 5, streams: [{name: t, trace: trace.jsonl}]}")
    assert len(list(generate(load_mix(path)))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": []}, "no streams"),
        ({"duration_s": 0}, "duration_s"),
        ({"typo": 1}, "typo"),
        ({"max_total_tokens": 1}, "at least 2"),
        ({"streams": [CHAT, CHAT]}, "unique"),
        ({"streams": [{**CHAT, "rate_per_s": 0}]}, "'chat': rate_per_s must be positive"),
        ({"streams": [{**CHAT, "lengths": "nope"}]}, "lengths is one of azure_code"),
        ({"streams": [{**CHAT, "trace": "x.csv"}]}, "a trace brings its own"),
        ({"streams": [{"name": "x"}]}, "give lengths and rate_per_s, or trace"),
        ({"streams": [{**CHAT, "tiers": {"default": 0}}]}, "weights"),
        ({"streams": [{**CHAT, "chain": {"calls": [5, 2]}}]}, "least, most"),
        ({"streams": [{**CHAT, "lengths": {"prompt": [2, 1], "output": [1, 2]}}]}, "Quantiles"),
        ({"phases": [{"name": "p", "at_s": 0, "rates": {"nope": 1}}]}, "'p': no synthetic stream"),
        ({"phases": [{"name": "p", "at_s": 900}]}, "after the end"),
        ({"phases": [{"name": "p", "at_s": 5}, {"name": "q", "at_s": 5}]}, "phases must rise"),
    ],
)
def test_wrong_mixes_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    content = {"name": "test", "duration_s": 100, "streams": [CHAT], **change}
    with pytest.raises(ConfigError, match=message):
        read_mix(content)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Packaged: agents, burst, calm, flip, gentle"):
        load_mix("nope")
    path = tmp_path / "mix.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"mix\.yaml is neither YAML nor JSON"):
        load_mix(path)
