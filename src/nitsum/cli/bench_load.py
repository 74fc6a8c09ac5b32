"""`nitsum bench serve` and `nitsum bench compare`: load over HTTP, judged from events."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nitsum.bench.calibrate import calibrate
from nitsum.bench.compare import (
    Side,
    compare,
    comparison_table,
    note_lines,
    ratios,
    read_sides,
)
from nitsum.bench.load import LoadState
from nitsum.bench.provenance import summary
from nitsum.bench.serve import Outcome, find_endpoint, run_load, with_canaries
from nitsum.bench.stream_client import Endpoint
from nitsum.cli.progress import note
from nitsum.cli.readers import seconds
from nitsum.cost.analytic import step_work
from nitsum.cost.shapes import shape_named
from nitsum.errors import ConfigError, NitsumError
from nitsum.metrics.eventfile import read_events
from nitsum.metrics.figures import figures
from nitsum.metrics.html import save_html
from nitsum.metrics.records import Recorder
from nitsum.metrics.report import Report, print_report, with_server
from nitsum.metrics.targets import Targets, load_targets, save_targets
from nitsum.server.run import loop_factory
from nitsum.shape import Geometry, ModelShape
from nitsum.sim.source import read_source
from nitsum.workload.generate import generate
from nitsum.workload.spec import MixSpec

_LINES_EVERY_S = 10.0
_FLUSHED_S = 1.0
"""An engine that has become idle has written its events by then."""


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="an OpenAI-compatible server")
    _add_workload_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="OUT.jsonl", help="write every event")
    parser.add_argument(
        "--html", type=Path, metavar="REPORT.html", help="write a report with plots"
    )
    parser.add_argument("--summary", type=Path, metavar="OUT.json", help="write the figures")
    parser.add_argument(
        "--server-events",
        type=Path,
        metavar="FILE",
        help="what its --events writes, on this machine: adds what ranks did, and switches",
    )
    parser.add_argument(
        "--server-model",
        default="",
        metavar="MODEL",
        help="its shape or folder: adds what ranks read (in bfloat16) and compute a second",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="TARGETS.json",
        help="measure lone and batched latency, write the targets of later runs, send no load",
    )
    parser.add_argument("--calibrate-batch", type=int, default=128, metavar="N")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sides",
        nargs="+",
        metavar="NAME=URL|FLAGS",
        help="a server that runs, or what `nitsum serve` is started with, quoted",
    )
    _add_workload_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each side")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write all figures")


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", default="mix:calm", help="trace file, synthetic:LENGTHS or mix:NAME|FILE")
    add("--rate", type=float, default=1.0, help="requests/s, or factor on a trace's or mix's rate")
    add("--duration", type=seconds, default=60.0, metavar="SECONDS", help="of the arrivals")
    add("--tiers", default="", metavar="T=W,...", help="weights of tiers, for traces and lengths")
    add("--seed", type=int, default=0)
    add("--model", default="", help="the model's name (default: the first the server lists)")
    add("--api-key", default=None)
    add("--no-tiers", action="store_true", help="leave service_tier out of requests")
    add("--vocab", type=int, default=30000, metavar="N", help="prompt token ids lie below")
    add("--max-tokens", type=int, default=0, help="prompt plus answer (default: the context)")
    add(
        "--targets",
        type=Path,
        metavar="TARGETS.json",
        help="what to judge by, from `bench serve --calibrate` (default: what tiers promise by "
        "default)",
    )
    add("--warmup", type=seconds, default=0.0, metavar="SECONDS", help="arrivals left out")
    add(
        "--drain",
        type=seconds,
        default=None,
        metavar="SECONDS",
        help="break off what is not answered so long after the last arrival; it counts as missed "
        "(default: wait for all)",
    )
    add("--canary", type=seconds, default=0.0, metavar="SECONDS", help="a short request every ...")
    add("--small-samples", action="store_true", help="print P99 from fewer than 1,000 samples too")


@dataclass(frozen=True)
class _Server:
    """What the loaded server writes itself, and the model it serves."""

    events: Path
    model: ModelShape | None


def run_serve(args: argparse.Namespace) -> int:
    """Load one server, or calibrate targets on it."""
    if args.calibrate is not None:
        return asyncio.run(_calibrate(args))
    server = _server(args)
    _check_folders(args.html, args.summary)
    endpoint, context = asyncio.run(_find(args, args.url))
    outcome = _load(args, endpoint, context, args.json)
    unread = None
    if server is not None:
        outcome, unread = _with_server(server, outcome, args.small_samples)
    print_report(outcome.report)
    if args.html is not None:
        save_html(
            outcome.report,
            outcome.recorder,
            args.html,
            title=f"{endpoint.model} under {args.trace}",
            targets=_targets(args),
        )
        note(f"Report: {args.html}")
    if args.summary is not None:
        _write(args.summary, summary(figures(outcome.report), "; ".join(outcome.report.notes)))
    if unread is not None:
        print(f"nitsum bench: {unread}", file=sys.stderr)
        return 1
    return 0


def _server(args: argparse.Namespace) -> _Server | None:
    """Raises `ConfigError` for what could not be read after the load either."""
    path: Path | None = args.server_events
    if path is None:
        if args.server_model:
            raise ConfigError("--server-model needs --server-events: what the server's ranks did.")
        return None
    if path.suffix == ".gz":
        raise ConfigError(
            f"--server-events: {path} is packed, and a server writes its --events unpacked. Name "
            f"the file that the server writes."
        )
    next(read_events(path, is_growing=True), None)
    return _Server(path, shape_named(args.server_model) if args.server_model else None)


def _check_folders(*paths: Path | None) -> None:
    """Of files that are written after the load."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"There is no folder {path.parent} to write {path.name} to.")


def _with_server(
    server: _Server, outcome: Outcome, small_samples: bool
) -> tuple[Outcome, NitsumError | None]:
    """The outcome with what the server's events add, or, if they cannot be read, with why."""
    time.sleep(_FLUSHED_S)
    try:
        seen = Recorder(read_events(server.events, is_growing=True))
    except NitsumError as error:
        notes = [*outcome.report.notes, f"without what the server did: {error}"]
        return replace(outcome, report=msgspec.structs.replace(outcome.report, notes=notes)), error
    work_of = None
    if server.model is not None:
        widest = max((step.group.degree for step in seen.steps), default=1)
        work_of = partial(step_work, Geometry(server.model, widest))
    report = with_server(outcome.report, seen, work_of, small_samples=small_samples)
    return replace(outcome, report=report), None


def run_compare(args: argparse.Namespace) -> int:
    """The same arrivals to every side, turn by turn."""

    notes: dict[str, list[str]] = {}

    def measure(side: Side, url: str, number: int) -> Report:
        note(f"Round {number + 1}: {side.name} at {url}")
        endpoint, context = asyncio.run(_find(args, url))
        report = _load(args, endpoint, context, None).report
        notes[side.name] = report.notes
        return report

    sides = read_sides(args.sides)
    results = compare(sides, args.rounds, measure)
    console = Console()
    console.print(comparison_table(results))
    for line in note_lines(notes):
        console.print(line, style="dim", highlight=False)
    if args.json is not None:
        _write(args.json, _comparison(results))
    return 0


def _comparison(results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Rounds of all sides, and what the first round-by-round ratios come to."""
    names = list(results)
    over: dict[str, float] = {}
    for figure in results[names[0]][0]:
        for name, values in ratios(results, figure).items():
            if values:
                over[f"{figure}_{name}_over_{names[0]}"] = sorted(values)[len(values) // 2]
    return {**summary(over, "medians of round-by-round ratios"), "rounds": results}


async def _find(args: argparse.Namespace, url: str) -> tuple[Endpoint, int]:
    return await find_endpoint(url, args.model, args.api_key, sends_tiers=not args.no_tiers)


async def _calibrate(args: argparse.Namespace) -> int:
    endpoint, context = await _find(args, args.url)
    limit = args.max_tokens or context
    if not limit:
        raise ConfigError("The server does not say how long its context is; give --max-tokens.")
    note(f"Measuring {endpoint.model} alone and {args.calibrate_batch} at a time.")
    targets = await calibrate(
        endpoint, vocab_size=args.vocab, max_tokens=limit, batch=args.calibrate_batch
    )
    save_targets(targets, args.calibrate)
    note(f"Targets: {args.calibrate}. Commit this file before the runs that are judged by it.")
    return 0


def _targets(args: argparse.Namespace) -> Targets | None:
    return None if args.targets is None else load_targets(args.targets)


def _workload(args: argparse.Namespace, context: int) -> MixSpec:
    pairs = [entry.partition("=") for entry in args.tiers.split(",") if entry]
    try:
        tiers = {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise ConfigError(f"--tiers: {args.tiers!r} is not like priority=1,flex=3.") from None
    return read_source(
        args.trace,
        rate_per_s=args.rate,
        duration_s=args.duration,
        seed=args.seed,
        tiers=tiers or None,
        max_total_tokens=args.max_tokens or context,
    )


def _load(
    args: argparse.Namespace, endpoint: Endpoint, context: int, events: Path | None
) -> Outcome:
    items = generate(_workload(args, context))
    if args.canary:
        items = with_canaries(items, args.canary, args.duration)
    with _Meter(args.duration) as meter, asyncio.Runner(loop_factory=loop_factory()) as runner:
        outcome = runner.run(
            run_load(
                endpoint,
                items,
                vocab_size=args.vocab,
                targets=_targets(args),
                warmup_s=args.warmup,
                events=events,
                on_progress=meter.show,
                small_samples=args.small_samples,
                drain_s=args.drain,
            )
        )
    if not outcome.state.num_done and not outcome.state.num_refused:
        kinds = ", ".join(outcome.state.errors) or "nothing was sent"
        raise NitsumError(f"No request was answered ({kinds}).")
    return outcome


class _Meter:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, duration_s: float) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("load", total=duration_s)
        self._start_s = self._line_s = time.monotonic()

    def __enter__(self) -> _Meter:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, state: LoadState) -> None:
        now = time.monotonic()
        text = (
            f"sent {state.num_sent}, open {state.num_open}, done {state.num_done}, refused "
            f"{state.num_refused}, failed {state.num_failed}, {state.num_tokens} tokens"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, completed=now - self._start_s)
        elif now - self._line_s >= _LINES_EVERY_S:
            self._line_s = now
            print(f"{now - self._start_s:5.0f} s  {text}", file=sys.stderr, flush=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
