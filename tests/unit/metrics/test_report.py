"""Series and reports: numbers known by hand, pages that stand alone."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from nitsum.cost.protocol import FixedCost
from nitsum.events import AnyEvent, GenerationStarted, RankTimed, Routed, StepEnded, StepSent
from nitsum.metrics.figures import figures
from nitsum.metrics.goodput import Window
from nitsum.metrics.html import render, save_html
from nitsum.metrics.ranks import rank_use
from nitsum.metrics.records import Recorder
from nitsum.metrics.report import Report, build_report, save_report, with_server
from nitsum.metrics.series import (
    lane_spans,
    output_tokens,
    prediction_error,
    prompt_tokens,
    queue_depth,
    token_rate,
)
from nitsum.metrics.tables import print_report
from nitsum.metrics.targets import default_targets
from nitsum.plan import Group
from nitsum.step import RankTime, StepWork
from tests.unit.metrics.streams import TP1, TP2, in_order, life, step, switch


def example() -> Recorder:
    """Ten requests, half of them priority, and one switch; the slowest misses its target."""
    lives: list[list[AnyEvent]] = [
        life(
            f"r{i}",
            float(i),
            [i + 0.1 * (i + 1) + 0.05 * j for j in range(30)],
            start_s=i + 0.05,
            tier=tier,
            tier_asked=tier,
            ttft_target_s=0.95,
            chain_id="c" if i < 2 else None,
        )
        for i in range(10)
        for tier in (("priority", "default")[i % 2],)
    ]
    waves = switch("s", ("2xTP1", "TP2"), [(4.9, 5.0, ["r4"])])
    wide = [step(8.0 + 0.1 * i, group=TP2, seconds=0.1, predicted_s=0.09) for i in range(10)]
    again = GenerationStarted(at_s=9.5, generation=2, num_replayed=0, restart_s=1.0)
    return Recorder(in_order(*lives, waves, *wide, [again]))


def test_the_report_adds_up() -> None:
    report = build_report(example())
    assert report.num_requests == 10
    assert report.attainment == pytest.approx(0.9)
    assert report.goodput_per_s == pytest.approx(1.0)
    assert [(t.tier, t.num_requests, t.num_met) for t in report.tiers] == [
        ("default", 5, 4),
        ("priority", 5, 5),
    ]
    assert report.tiers[1].ttft_s.p50 == pytest.approx(0.5)
    assert report.tiers[1].queue_s.p50 == pytest.approx(0.05)
    assert report.tiers[1].tpot_s.p50 == pytest.approx(0.05)
    assert report.chains.num_chains == 1
    assert report.chains.latency_s.p50 == pytest.approx(1 + 0.2 + 29 * 0.05)
    assert report.switches[0].num_switches == 1
    assert report.num_restarts == 1
    assert report.step_prediction_error == pytest.approx(0.1)
    assert report.scaled == []


def test_a_targets_file_replaces_the_server_s_own() -> None:
    targets = default_targets(FixedCost(0.02, 1e-4), 1, "fake")  # TTFT 100 ms and 300 ms
    report = build_report(example(), targets=targets)
    assert report.attainment == 0.0
    assert [scaled.factor for scaled in report.scaled] == [0.5, 2.0]
    assert "fake" in report.notes[0]


def test_no_targets_is_said_where_a_share_would_be() -> None:
    lives = [life(f"r{i}", float(i), [i + 0.5], tier_asked="own") for i in range(3)]
    report = build_report(Recorder(in_order(*lives)))
    assert (report.attainment, report.tiers[0].attainment) == (None, None)
    assert "own: no targets; left out of goodput and attainment" in report.notes
    out = io.StringIO()
    print_report(report, Console(file=out, width=160))
    assert "goodput -/s, attainment no targets" in out.getvalue()
    assert "│ no targets │" in out.getvalue()
    page = render(report, Recorder(in_order(*lives)), title="own")
    assert "<polyline" not in page.split("met their targets</h2>")[1].split("<h2>")[0]


def test_warmup_is_left_out_and_said() -> None:
    report = build_report(example(), warmup_s=2.5)
    assert report.num_requests == 7
    assert any("warm-up: 3 requests" in note for note in report.notes)


def test_an_empty_run_has_a_report_too() -> None:
    report = build_report(Recorder())
    assert (report.num_requests, report.goodput_per_s, report.tiers) == (0, None, [])
    assert "<svg" not in render(report, Recorder(), title="empty")


def test_reports_survive_json(tmp_path: Path) -> None:
    report, path = build_report(example()), tmp_path / "report.json"
    save_report(report, path)
    assert msgspec.json.decode(path.read_bytes(), type=Report) == report


def test_the_text_names_tiers_switches_and_withholds_p99() -> None:
    out = io.StringIO()
    print_report(build_report(example()), Console(file=out, width=160))
    text = out.getvalue()
    assert "priority" in text
    assert "2xTP1 -> TP2" in text
    assert "goodput 1/s" in text
    requests, latency = [line for line in text.splitlines() if line.startswith("│ priority")]
    assert requests.split("│")[2:4] == ["        5 ", " 100.0% "]
    assert latency.count("/- ms") == 2


@pytest.mark.parametrize("width", [80, 60])
def test_narrow_pages_have_all_of_a_report(width: int) -> None:
    out = io.StringIO()
    print_report(build_report(example(), small_samples=True), Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    wide = io.StringIO()
    print_report(build_report(example(), small_samples=True), Console(file=wide, width=200))
    if width == 80:
        rows = [line for line in wide.getvalue().splitlines() if line.startswith("│")]
        assert [row for row in rows if row not in text] == []


def test_who_kept_a_tier_without_a_promise_is_counted() -> None:
    events = [
        *life("a", 0.0, [1.0, 2.0], tier="priority", tier_asked="priority"),
        *life("b", 0.0, [1.0, 2.0], tier="priority", tier_asked="priority"),
    ]
    routed = Routed(at_s=0.5, request_id="b", group=TP1, promised=False, late=True)
    report = build_report(Recorder(in_order(events, [routed])))
    assert [(tier.num_requests, tier.num_late) for tier in report.tiers] == [(2, 1)]
    out = io.StringIO()
    print_report(report, Console(file=out, width=160))
    assert "0/0/1/0" in out.getvalue()


def test_figures_are_flat_and_rest_on_enough_samples() -> None:
    flat = figures(build_report(example()), prefix="ours_")
    assert flat["ours_goodput_requests_per_s"] == pytest.approx(1.0)
    assert flat["ours_priority_attainment_share"] == 1.0
    assert flat["ours_switch_2xtp1_to_tp2_num"] == 1.0
    assert not any("p99" in name for name in flat)
    assert "ours_priority_ttft_p99_s" in figures(
        build_report(example(), small_samples=True), prefix="ours_"
    )


def test_the_page_stands_alone_and_is_well_formed(tmp_path: Path) -> None:
    run = example()
    path = tmp_path / "report.html"
    save_html(build_report(run), run, path, title="a <b> & c")
    page = path.read_text()
    assert "a &lt;b&gt; &amp; c" in page
    assert not re.search(r"https?://|<script|<link|@import", page)
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        ElementTree.fromstring(plot)
    assert plots[0].count("<rect") == len(lane_spans(run.steps, build_report(run).window))
    assert all("2xTP1 to TP2" in plot for plot in plots)
    assert "TP2</span>" in page


# --- series ---------------------------------------------------------------------------------------


def test_time_in_steps_merges_overlaps_and_clips() -> None:
    steps = Recorder(
        in_order(
            step(1.0, seconds=1.0, group=TP1),
            step(1.5, seconds=1.0, group=TP2),
            step(11.0, seconds=2.0, group=Group(1, 1)),
        )
    ).steps
    ranks = rank_use(steps, Window(0.0, 10.0))
    assert [rank.step_share for rank in ranks] == pytest.approx([0.15, 0.2])
    assert [rank.busy_share for rank in ranks] == pytest.approx([0.15, 0.2])


def test_a_rank_that_stood_still_is_one() -> None:
    run = Recorder(in_order(step(1.0, group=TP2, seconds=1.0), step(11.0, seconds=2.0)))
    ranks = rank_use(run.steps, Window(5.0, 15.0))
    assert [rank.busy_share for rank in ranks] == pytest.approx([0.2, 0.0])


def timed(at_s: float, rank: int, *times: RankTime) -> RankTimed:
    return RankTimed(at_s=at_s, rank=rank, steps=list(times))


@pytest.mark.parametrize("is_early", [True, False])
def test_waiting_for_a_peer_is_no_work(is_early: bool) -> None:
    """Rank 0 came 0.3 s before rank 1, which came 0.1 s before 2 and 3; 2 says it waited later."""
    wide = Group(4, 0)
    sent, ended = step(2.0, group=wide, seconds=1.0)
    assert isinstance(ended, StepEnded)
    told = [
        timed(1.9 if is_early else 2.1, rank, RankTime(ended.step_id, seconds, waited_s))
        for rank, seconds, waited_s in ((1, 0.7, 0.0), (2, 0.6, 0.2))
    ]
    run = Recorder([sent, *told, ended] if is_early else [sent, ended, *told])
    (record,) = run.steps
    # rank 3 said nothing: as busy as rank 0, whom the quickest kept waiting 0.4 s at least
    assert [record.busy_s(rank) for rank in range(4)] == pytest.approx([0.6, 0.6, 0.4, 0.6])
    ranks = rank_use(run.steps, Window(0.0, 2.0))
    assert [rank.step_share for rank in ranks] == pytest.approx([0.5] * 4)
    assert [rank.busy_share for rank in ranks] == pytest.approx([0.3, 0.3, 0.2, 0.3])


@pytest.mark.parametrize("is_early", [True, False])
def test_ranks_tell_of_their_own_process_s_steps(is_early: bool) -> None:
    """A file that two servers wrote one after the other: both count their steps from one."""
    sent, ended = step(2.0, group=TP2, seconds=1.0)
    assert isinstance(sent, StepSent)
    assert isinstance(ended, StepEnded)
    told = timed(9.0, 1, RankTime(ended.step_id, 0.8, 0.5))
    again = msgspec.structs.replace(sent, at_s=8.0), msgspec.structs.replace(ended, at_s=9.0)
    sent_again, ended_again = again
    later = [told, ended_again] if is_early else [ended_again, told]
    run = Recorder([sent, ended, sent_again, *later])
    assert [each.busy_s(1) for each in run.steps] == pytest.approx([1.0, 0.3])
    # the first server was killed before the step ended of which rank 1 had told
    run = Recorder([sent, told, sent_again, ended_again])
    assert [each.busy_s(1) for each in run.steps] == pytest.approx([1.0])


def test_what_a_leader_knows_to_have_waited_is_no_work() -> None:
    _, ended = step(2.0, group=TP2, seconds=1.0)
    assert isinstance(ended, StepEnded)
    run = Recorder([msgspec.structs.replace(ended, waited_s=0.25)])
    assert [run.steps[0].busy_s(rank) for rank in (0, 1)] == pytest.approx([0.75, 0.75])


def test_what_steps_read_and_compute_is_counted_by_rank() -> None:
    run = Recorder(in_order(step(1.0, seconds=1.0), step(11.0, group=TP2, seconds=2.0)))
    ranks = rank_use(run.steps, Window(0.0, 10.0), lambda degree, _: StepWork(8 // degree, 100))
    # all of the first step on rank 0, half of the second on both
    assert [rank.read_bytes_per_s for rank in ranks] == pytest.approx([1.0, 0.2])
    assert [rank.flops_per_s for rank in ranks] == pytest.approx([15.0, 5.0])
    found = figures(build_report(run, work_of=lambda degree, _: StepWork(8 // degree, 100)))
    assert found == {"num_requests": 0.0}, "no arrivals, no window"


def test_a_client_s_report_is_told_what_the_server_did() -> None:
    client = build_report(Recorder(life("a", 0.0, [1.0, 9.0]) + life("b", 10.0, [11.0])))
    assert client.window == Window(0.0, 10.0)
    server = Recorder(in_order(step(4.0, group=TP2, seconds=2.0), step(30.0, seconds=9.0)))
    both = with_server(client, server, lambda _degree, _shape: StepWork(5 * 10**12, 10**15))
    assert [rank.busy_share for rank in both.ranks] == pytest.approx([0.2, 0.2])
    found = figures(both)
    assert found["rank1_busy_share"] == pytest.approx(0.2)
    assert found["busy_share"] == pytest.approx(0.2)
    assert found["read_bytes_per_s"] == pytest.approx(5e11)
    text = io.StringIO()
    print_report(both, Console(file=text, width=160))
    assert "busy 20.0% (in steps 20.0%), 0.50 TB/s read, 100 TFLOP/s" in text.getvalue()


def test_a_server_s_restarts_and_switches_are_cut_to_the_client_s_window() -> None:
    client = build_report(Recorder(life("a", 0.0, [1.0, 9.0]) + life("b", 10.0, [11.0])))
    restarts = [
        GenerationStarted(at_s=at_s, generation=2, num_replayed=0, restart_s=1.0)
        for at_s in (-5.0, 5.0, 50.0)
    ]
    switches = [
        switch(f"s{at_s}", ("2xTP1", "TP2"), [(at_s, at_s + 0.5, ["r"])]) for at_s in (7.0, 70.0)
    ]
    stream = life("r", 6.0, [6.5 + 0.1 * i for i in range(30)])
    server = Recorder(in_order(restarts, *switches, stream))
    both = with_server(client, server)
    assert both.num_restarts == 1
    assert both.switches[0].num_switches == 1
    assert both.switches[0].added_pause_s.p99 is None
    both = with_server(client, server, small_samples=True)
    assert both.switches[0].added_pause_s.p99 is not None


def test_token_counts_respect_the_window() -> None:
    run = Recorder(life("a", 0.0, [1.0, 2.0, 3.0, 4.0]))
    assert output_tokens(run.requests.values(), Window(2.0, 3.0)) == 2
    assert prompt_tokens(run.requests.values(), Window(0.5, 1.0)) == 100
    assert prompt_tokens(run.requests.values(), Window(1.5, 9.0)) == 0
    rate = token_rate(run.steps, Window(0.0, 4.0), num_buckets=2)
    assert [y for _, y in rate.points] == [0.5, 1.5]


def test_queue_depth_counts_those_who_wait() -> None:
    run = Recorder(in_order(*(life(f"r{i}", i, [9.5], start_s=8.5) for i in range(4))))
    (depth,) = queue_depth(run.requests.values(), Window(0.0, 10.0), num_buckets=10)
    assert [y for _, y in depth.points] == [1, 2, 3, 4, 4, 4, 4, 4, 4, 0, 0]


def test_prediction_error_needs_predictions() -> None:
    run = Recorder(in_order(step(1.0, seconds=0.1), step(2.0, seconds=0.1, predicted_s=0.12)))
    assert prediction_error(run.steps) == pytest.approx(0.2)
    assert prediction_error(run.steps[:1]) is None
