"""Events in, records out, with answers known by hand; files that survive; percentiles."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.errors import ConfigError
from nitsum.events import Displaced, Downgraded, Promoted, Refused, Resumed, Routed, WaveRolledBack
from nitsum.metrics.eventfile import EventFile, read_events, write_events
from nitsum.metrics.percentiles import MIN_SAMPLES_P99, percentile, summarise
from nitsum.metrics.records import Recorder
from tests.unit.metrics.streams import TP1, arrived, finished, in_order, life, step, switch


def test_latencies_of_one_request() -> None:
    run = Recorder(life("a", 10.0, [11.0, 11.5, 13.0, 13.5], start_s=10.4))
    record = run.requests["a"]
    assert record.queue_s == pytest.approx(0.4)
    assert record.ttft_s == pytest.approx(1.0)
    assert record.tpot_s == pytest.approx(2.5 / 3)
    assert record.longest_gap_s == pytest.approx(1.5)
    assert record.e2e_s == pytest.approx(3.5)
    assert (record.num_output, record.outcome) == (4, "length")


def test_latencies_count_from_the_server_not_the_engine() -> None:
    events = [arrived("a", 5.0, arrival_s=4.0), *step(6.0, "a"), finished("a", 6.0)]
    assert Recorder(events).requests["a"].ttft_s == pytest.approx(2.0)


def test_the_last_token_counts_though_its_request_is_finished_already() -> None:
    sent, ended = step(2.0, "a")
    run = Recorder([arrived("a", 1.0), sent, finished("a", 2.0), ended])
    assert run.requests["a"].num_output == 1


def test_an_unanswered_request_has_no_latencies() -> None:
    record = Recorder([arrived("a", 1.0)]).requests["a"]
    assert record.outcome == "unfinished"
    values = (record.queue_s, record.ttft_s, record.tpot_s, record.longest_gap_s, record.e2e_s)
    assert values == (None,) * 5


def test_a_refusal_may_come_before_any_arrival() -> None:
    run = Recorder([Refused(at_s=3.0, request_id="a", tier="flex", code="resource_unavailable")])
    record = run.requests["a"]
    assert (record.outcome, record.tier_asked, record.e2e_s) == ("refused", "flex", None)
    assert record.refused_code == "resource_unavailable"


def test_what_happened_on_the_way_is_kept() -> None:
    who = {"by_request_id": "b", "by_tier": "priority", "tier": "default"}
    run = Recorder(
        [
            arrived("a", 0.0, tier_asked="priority", tier="priority"),
            Routed(at_s=0.1, request_id="a", group=TP1, promised=False),
            Downgraded(
                at_s=0.2, request_id="a", from_tier="priority", to_tier="default", reason="quota"
            ),
            Displaced(at_s=1.0, request_id="a", step_id=3, **who),
            Resumed(at_s=2.0, request_id="a", step_id=4, num_recomputed=0),
            Displaced(at_s=3.0, request_id="a", step_id=5, **who),
            Promoted(at_s=3.5, request_id="a", tier="default", waited_s=2.0),
            finished("a", 4.0, reason="abort"),
        ]
    )
    record = run.requests["a"]
    assert (record.tier_asked, record.tier_served) == ("priority", "default")
    assert record.downgrade_reason == "quota"
    assert not record.promised
    assert record.num_displaced == 2
    assert record.paused == [(1.0, 2.0), (3.0, 4.0)]
    assert record.num_promoted == 1
    assert record.outcome == "abort"


def test_who_kept_its_tier_without_a_promise_is_known_by_its_last_route() -> None:
    def routed(at_s: float, *, promised: bool, late: bool) -> Routed:
        return Routed(at_s=at_s, request_id="a", group=TP1, promised=promised, late=late)

    late = routed(0.1, promised=False, late=True)
    assert Recorder([arrived("a", 0.0), late]).requests["a"].late
    again = routed(0.2, promised=True, late=False)
    assert not Recorder([arrived("a", 0.0), late, again]).requests["a"].late


def test_events_of_unknown_requests_are_left_alone() -> None:
    run = Recorder([finished("ghost", 1.0), *step(2.0, "ghost")])
    assert run.requests == {}
    assert run.steps[0].num_tokens_out == 1


def test_steps_join_what_was_sent_and_what_came_back() -> None:
    run = Recorder(step(2.0, "a", "b", seconds=0.5, prefill_tokens=64, predicted_s=0.4))
    (record,) = run.steps
    assert (record.sent_s, record.ended_s, record.seconds) == (1.5, 2.0, 0.5)
    assert (record.num_decode, record.prefill_tokens, record.predicted_s) == (2, 64, 0.4)


def test_switches_keep_their_waves() -> None:
    events = switch("s1", ("2xTP1", "TP2"), [(1.0, 2.0, ["a"]), (2.0, 4.0, ["b"])], 500)
    rolled = WaveRolledBack(at_s=1.5, op_id="s1", wave=0, request_ids=["a"], reason="full")
    (record,) = Recorder(in_order(events, [rolled])).switches
    assert record.duration_s == pytest.approx(3.0)
    assert record.bytes_moved == 1000
    assert [w.moved_ids for w in record.waves] == [("a",), ("b",)]
    assert record.waves[0].rollback_reason == "full"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["events.jsonl", "events.jsonl.gz"])
def test_events_survive_the_disk(tmp_path: Path, name: str) -> None:
    events = in_order(life("a", 1.0, [2.0, 3.0]), switch("s", ("x", "y"), [(1.5, 2.5, ["a"])]))
    write_events(tmp_path / name, events)
    assert list(read_events(tmp_path / name)) == events
    is_packed = (tmp_path / name).read_bytes()[:2] == b"\x1f\x8b"
    assert is_packed == name.endswith(".gz")


def test_files_from_before_late_was_told_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    routed = Routed(at_s=1.0, request_id="a", group=TP1, promised=False, late=False)
    fields = msgspec.to_builtins(routed)
    del fields["late"]
    path.write_bytes(msgspec.json.encode(fields) + b"\n")
    assert list(read_events(path)) == [routed]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventFile(path) as file:
        file.emit(finished("a", 1.0))
    path.write_bytes(path.read_bytes() + b'{"type": "Nothing"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        list(read_events(path))
    with pytest.raises(ConfigError, match="No such file"):
        list(read_events(tmp_path / "none.jsonl"))


def test_a_packed_file_that_is_cut_off_is_said(tmp_path: Path) -> None:
    """Its writer was killed, or has not come to its end; what is there can be had by asking."""
    whole, cut = tmp_path / "whole.jsonl.gz", tmp_path / "cut.jsonl.gz"
    events = [finished(f"r{i}", float(i)) for i in range(2000)]
    write_events(whole, events)
    cut.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(ConfigError, match=r"cut\.jsonl\.gz ends in the middle"):
        list(read_events(cut))
    read = list(read_events(cut, is_growing=True))
    assert 0 < len(read) < 2000
    assert read == events[: len(read)]


@pytest.mark.parametrize("at", [0, 100])
def test_a_packed_file_that_is_none_is_said(tmp_path: Path, at: int) -> None:
    path = tmp_path / "events.jsonl.gz"
    write_events(path, [finished(f"r{i}", float(i)) for i in range(100)])
    content = bytearray(path.read_bytes())
    content[at : at + 50] = b"x" * 50
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"events\.jsonl\.gz"):
        list(read_events(path))


def test_events_written_before_a_field_existed_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl.gz"
    line = (
        b'{"type":"Arrived","at_s":1,"request_id":"a","tier_asked":"default","tier":"default",'
        b'"tenant":"t","num_prompt":3,"max_tokens":4,"arrival_s":1}\n'
    )
    path.write_bytes(gzip.compress(line))
    assert Recorder(read_events(path)).requests["a"].chain_deadline_s is None


# --- percentiles ----------------------------------------------------------------------------------

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200)


@given(values, st.floats(0, 1), st.floats(0, 1))
def test_percentiles_rise_and_stay_inside(numbers: list[float], a: float, b: float) -> None:
    ordered = sorted(numbers)
    low, high = sorted((a, b))
    slack = 1e-9 * max(map(abs, ordered))
    assert percentile(ordered, low) <= percentile(ordered, high) + slack
    assert ordered[0] - slack <= percentile(ordered, a) <= ordered[-1] + slack


@given(values)
def test_the_ends_are_the_extremes_and_the_middle_splits(numbers: list[float]) -> None:
    ordered = sorted(numbers)
    assert percentile(ordered, 0.0) == ordered[0]
    assert percentile(ordered, 1.0) == ordered[-1]
    middle = percentile(ordered, 0.5)
    assert sum(x < middle for x in ordered) <= len(ordered) / 2
    assert sum(x > middle for x in ordered) <= len(ordered) / 2


def test_a_p99_needs_a_thousand_samples() -> None:
    few = [float(i) for i in range(MIN_SAMPLES_P99 - 1)]
    assert summarise(few).p99 is None
    assert summarise(few, small_samples=True).p99 == pytest.approx(0.99 * 998)
    assert summarise([*few, 999.0]).p99 == pytest.approx(0.99 * 999)


def test_missing_values_are_not_samples() -> None:
    assert summarise([None, 1.0, None, 3.0]).num == 2
    assert summarise([None, 1.0, None, 3.0]).mean == 2.0
    assert summarise([None]).p50 is None
