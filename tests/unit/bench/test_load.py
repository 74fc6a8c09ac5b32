"""The load generator against a real server with a fake engine: what it sends, what it records."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from rich.console import Console

from nitsum.bench.calibrate import calibrate, prompt_lengths
from nitsum.bench.canary import with_canaries
from nitsum.bench.compare import (
    Side,
    comparison_table,
    note_lines,
    ratios,
    read_sides,
    running,
)
from nitsum.bench.serve import find_endpoint, run_load
from nitsum.cli import main
from nitsum.cost.protocol import FixedCost
from nitsum.engine.fake_client import FakeEngineClient, echo
from nitsum.errors import ConfigError, NitsumError
from nitsum.metrics.eventfile import read_events
from nitsum.metrics.records import Recorder
from nitsum.metrics.targets import Targets, TierRule, default_targets, save_targets
from nitsum.request import Request
from nitsum.server.app import build_app
from nitsum.server.settings import ServerSettings
from nitsum.workload.items import CallScript, Chain, Segment, WorkItem

VOCAB = 200


def item(name: str, at_s: float = 0.0, **changes: object) -> WorkItem:
    fields = {
        "request_id": name,
        "at_s": at_s,
        "num_output": 5,
        "tier": "default",
        "tenant": "",
        "segments": (Segment(name, 12),),
    }
    return WorkItem(**{**fields, **changes})  # type: ignore[arg-type]


@contextmanager
def served(client: FakeEngineClient, folder: Path) -> Iterator[str]:
    """A server without a tokenizer, in a thread, on a free port."""
    settings = ServerSettings(
        checkpoint=folder, model_names=("tiny",), max_model_len=64, vocab_size=VOCAB, port=0
    )
    config = uvicorn.Config(build_app(client, settings), log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def load(url: str, items: list[WorkItem], **options: object):
    async def run():
        endpoint, _ = await find_endpoint(url)
        return await run_load(endpoint, items, vocab_size=VOCAB, **options)  # type: ignore[arg-type]

    return asyncio.run(run())


@pytest.fixture
def fake() -> FakeEngineClient:
    return FakeEngineClient(delay_s=0.001)


def test_every_token_is_counted_and_every_request_ends(fake: FakeEngineClient, tmp_path: Path):
    events = tmp_path / "events.jsonl"
    with served(fake, tmp_path) as url:
        outcome = load(url, [item(f"r{i}", 0.01 * i) for i in range(8)], events=events)
    assert outcome.state.num_done == 8
    assert outcome.state.num_tokens == 40
    records = Recorder(read_events(events)).requests
    assert [record.num_output for record in records.values()] == [5] * 8
    assert {record.outcome for record in records.values()} == {"length"}


def test_what_is_not_answered_in_time_is_broken_off(tmp_path: Path):
    slow = FakeEngineClient(delay_s=0.05)
    with served(slow, tmp_path) as url:
        outcome = load(url, [item("short", num_output=2), item("long", num_output=50)], drain_s=0.5)
    outcomes = {name: each.outcome for name, each in outcome.recorder.requests.items()}
    assert outcomes == {"short": "length", "long": "unfinished"}
    assert 0 < outcome.recorder.requests["long"].num_output < 50
    assert outcome.state.num_open == 0
    assert any("no end" in note for note in outcome.report.notes)


def test_the_end_of_a_run_does_not_wait_for_a_free_stream(tmp_path: Path):
    """Who gets none until then has arrived all the same."""
    slow = FakeEngineClient(delay_s=0.05)
    items = [item("long", num_output=50), item("second"), item("third", 0.01)]
    with served(slow, tmp_path) as url:
        outcome = load(url, items, drain_s=0.3, max_open=1)
    outcomes = {name: each.outcome for name, each in outcome.recorder.requests.items()}
    assert outcomes == dict.fromkeys(["long", "second", "third"], "unfinished")
    assert (outcome.state.num_sent, outcome.state.num_open) == (1, 0)
    assert outcome.state.max_late_s > 0.25
    assert outcome.report.num_requests == 3
    assert len(slow.requests) == 1


def test_a_sender_who_thinks_holds_no_stream(fake: FakeEngineClient, tmp_path: Path):
    """As many chains as there are streams would wait for each other for ever."""
    calls = CallScript(12, 5, 0.0), CallScript(4, 3, 0.05)
    chains = [item(name, chain=Chain(name, calls, deadline_s=9.0)) for name in ("a.0", "b.0")]
    with served(fake, tmp_path) as url:
        outcome = load(url, chains, max_open=1)
    assert outcome.state.num_done == 4


@pytest.mark.parametrize("flag", ["--drain", "--warmup", "--duration", "--canary"])
def test_times_are_not_negative(flag: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_serve("http://127.0.0.1:9", flag, "-1")
    assert f"argument {flag}" in capsys.readouterr().err


def test_latency_counts_from_the_planned_arrival(fake: FakeEngineClient, tmp_path: Path):
    """A request that could only be sent late is late for its user."""
    with served(fake, tmp_path) as url:
        outcome = load(url, [item("early", -1.0)])
    record = outcome.recorder.requests["early"]
    assert record.ttft_s is not None
    assert record.ttft_s > 1.0
    assert any("generator itself" in note for note in outcome.report.notes)


def test_the_server_is_told_how_soon_a_request_is_wanted(fake: FakeEngineClient, tmp_path: Path):
    """By the length of its prompt: a tier alone could not say it."""
    targets = Targets(
        source="t", prefill=[(1, 0.01), (100, 1.0)], tiers={"default": TierRule(k=2.0, tpot_s=0.1)}
    )
    with served(fake, tmp_path) as url:
        outcome = load(url, [item("r")], targets=targets)
    asked_s = targets.of("default", 12).ttft_s
    assert asked_s is not None
    assert fake.requests[0].ttft_target_s == pytest.approx(asked_s)
    assert outcome.recorder.requests["r"].ttft_target_s == asked_s


def test_without_targets_a_tier_s_default_promise_is_the_measure(tmp_path: Path):
    """The server is told nothing: it may have promised something else."""
    slow = FakeEngineClient(delay_s=0.12)  # 100 ms a token is what `default` promises
    items = [item("paced"), item("deadline", tier="batch")]
    with served(slow, tmp_path) as url:
        outcome = load(url, items)
    by_tier = {tier.tier: tier.attainment for tier in outcome.report.tiers}
    assert by_tier == {"default": 0.0, "batch": 1.0}
    assert outcome.report.attainment == 0.5
    assert slow.requests[0].ttft_target_s is None
    said = outcome.report.notes[0]
    assert "what tiers promise by default" in said
    assert "default 2 s and 100 ms a token" in said
    assert "nitsum bench serve --calibrate" in said


def test_refusals_and_downgrades_are_recorded(tmp_path: Path):
    with served(FakeEngineClient(tier=lambda _request: ("default", "capacity")), tmp_path) as url:
        outcome = load(url, [item("asked", tier="priority")])
    record = outcome.recorder.requests["asked"]
    assert (record.tier_asked, record.tier_served) == ("priority", "default")
    with served(FakeEngineClient(), tmp_path) as url:
        outcome = load(url, [item("long", segments=(Segment("long", 100),))])
    assert outcome.state.num_refused == 1
    assert outcome.recorder.requests["long"].outcome == "refused"


def test_a_chain_sends_its_next_call_after_the_answer(fake: FakeEngineClient, tmp_path: Path):
    chain = Chain("c", (CallScript(12, 5, 0.0), CallScript(4, 3, 0.01)), deadline_s=9.0)
    with served(fake, tmp_path) as url:
        outcome = load(url, [item("c.0", chain=chain)])
    first, second = outcome.recorder.requests.values()
    assert second.num_prompt == 12 + 5 + 4
    assert second.arrival_s > (first.finished_s or 0.0)
    assert fake.requests[1].prompt[12:17] != []
    assert fake.requests[1].chain_id == "c"


def test_canaries_load_but_do_not_count(fake: FakeEngineClient, tmp_path: Path):
    items = list(with_canaries([item("a", 0.0), item("b", 0.25)], 0.1, 0.3))
    assert len(items) == 4
    with served(fake, tmp_path) as url:
        outcome = load(url, items)
    assert outcome.report.num_requests == 2
    assert any("2 canaries" in note for note in outcome.report.notes)


def test_nobody_there_is_said(tmp_path: Path):
    with pytest.raises(NitsumError, match="No OpenAI-compatible server"):
        asyncio.run(find_endpoint("http://127.0.0.1:9"))


# --- the command ---------------------------------------------------------------------------------


def bench_serve(url: str, *more: str | Path) -> int:
    load = ["--trace", "synthetic:azure_code", "--rate", "10", "--duration", "1", "--vocab", "200"]
    return main(["bench", "serve", "--url", url, *load, *map(str, more)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--server-events", "none.jsonl"], "No such file"),
        (["--server-events", "other.txt"], "other.txt, line 1"),
        (["--server-events", "run.jsonl.gz"], "is packed"),
        (["--server-events", "engine.jsonl", "--server-model", "GPT-9"], "'GPT-9' is neither"),
        (["--server-model", "Llama-3.1-8B"], "needs --server-events"),
        (["--summary", "nowhere/out.json"], "no folder nowhere"),
        (["--html", "nowhere/out.html"], "no folder nowhere"),
        (["--trace", "nowhere.csv"], "No trace 'nowhere.csv'"),
        (["--trace", "bad.jsonl"], "bad.jsonl"),
        (["--trace", "mix:unheard"], "No mix 'unheard'"),
        (["--trace", "mix:gentle", "--tiers", "flex=1"], "leave --tiers out"),
        (["--rate", "0.001"], "nothing arrives in 1 s"),
        (["--targets", "none.json"], "Cannot read targets none.json"),
        (["--targets", "targets.json", "--tiers", "gold=1"], "no rule for tier 'gold'"),
    ],
)
def test_what_could_spoil_the_report_is_said_before_the_load(
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Nobody answers there, which comes second."""
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("a letter\n")
    Path("run.jsonl.gz").write_bytes(b"")
    Path("engine.jsonl").write_text("")
    Path("bad.jsonl").write_text("nonsense")
    save_targets(default_targets(FixedCost(0.01, 1e-4), 1, "fake"), Path("targets.json"))
    assert bench_serve("http://127.0.0.1:9", *flags) == 2
    assert said in capsys.readouterr().err


def test_a_load_without_any_answer_in_time_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with served(FakeEngineClient(delay_s=30.0), tmp_path) as url:
        code = bench_serve(url, "--drain", "0")
    assert code == 1
    assert "No request was answered (none within --drain" in capsys.readouterr().err


def test_figures_of_a_load_outlive_the_servers_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    engine, figures = tmp_path / "engine.jsonl", tmp_path / "figures.json"
    engine.write_text("")

    def spoil(request: Request) -> Sequence[int]:
        engine.write_text("nonsense\n")
        return echo(request)

    with served(FakeEngineClient(spoil, delay_s=0.001), tmp_path) as url:
        code = bench_serve(url, "--server-events", engine, "--summary", figures)
    assert code == 1
    assert "engine.jsonl, line 1" in capsys.readouterr().err
    written = json.loads(figures.read_text())
    assert written["figures"]["num_requests"] > 0
    assert "engine.jsonl, line 1" in written["notes"]


def test_calibration_gives_ascending_prefill_times(fake: FakeEngineClient, tmp_path: Path):
    stages: list[str] = []
    with served(fake, tmp_path) as url:

        async def run():
            endpoint, context = await find_endpoint(url)
            return await calibrate(
                endpoint, vocab_size=VOCAB, max_tokens=context, batch=2, on_stage=stages.append
            )

        targets = asyncio.run(run())
    lengths = [length for length, _ in targets.prefill]
    seconds = [second for _, second in targets.prefill]
    assert lengths == prompt_lengths(64)
    assert seconds == sorted(seconds)
    assert stages[0] == "prompts of 16 to 32 tokens, alone (1/3)"
    assert stages[-1] == "2 answers at once, after 40 tokens each"


def test_ratios_are_to_the_first_side_round_by_round():
    results = {"a": [{"x": 2.0}, {"x": 4.0}], "b": [{"x": 3.0}, {"x": 2.0}]}
    assert ratios(results, "x") == {"b": [1.5, 0.5]}
    assert comparison_table(results).row_count == 0


def test_comparisons_are_whole_on_narrow_pages():
    tall = {"priority_ttft_p50_s": 0.01822, "goodput_requests_per_s": 12.345}
    results = {"ours": [tall, tall], "another_server": [{k: 1.2 * v for k, v in tall.items()}] * 2}
    out = io.StringIO()
    Console(file=out, width=80).print(comparison_table(results))
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    (first,) = [line for line in text.splitlines() if "priority TTFT P50, ms" in line]
    assert "│ ours" in first
    assert "18.2 (18.2..18.2)" in first
    assert "21.9 (21.9..21.9) │ 1.2 (1.2..1.2)" in text


def test_notes_of_all_sides_are_said_once():
    notes = {"a": ["targets: t", "late"], "b": ["targets: t"]}
    assert note_lines(notes) == ["note: targets: t", "note, a: late"]


def test_a_comparison_says_what_it_is_judged_by(
    fake: FakeEngineClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    load = ["--trace", "synthetic:azure_code", "--rate", "10", "--duration", "1", "--vocab", "200"]
    with served(fake, tmp_path) as url:
        code = main(["bench", "compare", f"a={url}", f"b={url}", "--rounds", "1", *load])
    assert code == 0
    assert capsys.readouterr().out.count("what tiers promise by default") == 1


def test_a_side_that_does_not_start_is_told_with_its_last_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """All that a side says is kept back otherwise."""
    side = Side("a", serve_flags=(str(tmp_path / "nothing"), "--ranks", "1"))
    said = r"'a' ended before it listened; it said:\n.*no model"
    with pytest.raises(NitsumError, match=said), running(side, is_quiet=True):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("entries", [["a=http://x"], ["a=m", "a=n"], ["http://x", "b=m"]])
def test_sides_need_two_names(entries: list[str]):
    with pytest.raises(ConfigError):
        read_sides(entries)
