"""`nitsum bench serve`: load over HTTP, judged from events."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from nitsum.bench.calibrate import calibrate
from nitsum.bench.provenance import summary
from nitsum.bench.serve import Outcome
from nitsum.cli.loading import (
    add_workload_arguments,
    check_load,
    find,
    send_load,
    targets_of,
    write_figures,
)
from nitsum.cli.progress import note
from nitsum.cost.analytic import step_work
from nitsum.cost.shapes import shape_named
from nitsum.errors import ConfigError, NitsumError
from nitsum.metrics.eventfile import read_events
from nitsum.metrics.figures import figures
from nitsum.metrics.html import save_html
from nitsum.metrics.records import Recorder
from nitsum.metrics.report import with_server
from nitsum.metrics.tables import print_report
from nitsum.metrics.targets import save_targets
from nitsum.shape import Geometry, ModelShape

_FLUSHED_S = 1.0
"""An engine that has become idle has written its events by then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="an OpenAI-compatible server")
    add_workload_arguments(parser)
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
    parser.add_argument(
        "--calibrate-batch",
        type=int,
        default=128,
        metavar="N",
        help="answers at once in the batch that gives the time per token of `default` "
        "(default: 128)",
    )


@dataclass(frozen=True)
class _Server:
    """What the loaded server writes itself, and the model it serves."""

    events: Path
    model: ModelShape | None


def run(args: argparse.Namespace) -> int:
    """Load one server, or calibrate targets on it."""
    if args.calibrate is not None:
        return asyncio.run(_calibrate(args))
    check_load(args)
    server = _server(args)
    _check_folders(args.html, args.summary)
    endpoint, context = asyncio.run(find(args, args.url))
    outcome = send_load(args, endpoint, context, args.json)
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
            targets=targets_of(args),
        )
        note(f"Report: {args.html}")
    if args.summary is not None:
        notes = "; ".join(outcome.report.notes)
        write_figures(args.summary, summary(figures(outcome.report), notes))
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


async def _calibrate(args: argparse.Namespace) -> int:
    endpoint, context = await find(args, args.url)
    limit = args.max_tokens or context
    if not limit:
        raise ConfigError("The server does not say how long its context is; give --max-tokens.")
    note(f"Measuring {endpoint.model} alone and {args.calibrate_batch} at a time.")
    targets = await calibrate(
        endpoint,
        vocab_size=args.vocab,
        max_tokens=limit,
        batch=args.calibrate_batch,
        on_stage=note,
    )
    save_targets(targets, args.calibrate)
    note(f"Targets: {args.calibrate}. Commit this file before the runs that are judged by it.")
    return 0
