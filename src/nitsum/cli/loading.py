"""The load of `nitsum bench serve` and `bench compare`: read, checked, said and sent."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nitsum.bench import canary
from nitsum.bench.load import LoadState
from nitsum.bench.serve import Outcome, find_endpoint, run_load
from nitsum.bench.stream_client import Endpoint
from nitsum.cli.progress import note
from nitsum.cli.readers import flag, number, seconds, weights
from nitsum.errors import ConfigError, NitsumError
from nitsum.metrics.targets import Targets, load_targets
from nitsum.server.run import loop_factory
from nitsum.sim.source import read_source
from nitsum.workload.generate import generate
from nitsum.workload.items import WorkItem
from nitsum.workload.spec import MixSpec

_LINES_EVERY_S = 10.0


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--trace",
        default="mix:gentle",
        help="what arrives: a .csv or .jsonl trace, synthetic:LENGTHS or mix:NAME|FILE (default: "
        "mix:gentle, a short request every two seconds)",
    )
    add(
        "--rate",
        type=flag(number),
        default=1.0,
        help="requests/s of synthetic arrivals; multiplies the rate of traces and mixes "
        "(default: 1)",
    )
    add(
        "--duration",
        type=flag(seconds),
        default=60.0,
        metavar="SECONDS",
        help="seconds of arrivals (default: 60)",
    )
    add(
        "--tiers",
        type=flag(weights),
        default=(),
        metavar="T=W,...|FILE",
        help="weights of tiers, where the mix names none: priority=1,default=3 or a YAML file",
    )
    add("--seed", type=int, default=0, help="of arrivals and lengths (default: 0, or the mix's)")
    add("--model", default="", help="the model's name (default: the first the server lists)")
    add("--api-key", default=None)
    add("--no-tiers", action="store_true", help="leave service_tier out of requests")
    add(
        "--vocab",
        type=int,
        default=30000,
        metavar="N",
        help="prompt token ids lie below (default: 30000)",
    )
    add("--max-tokens", type=int, default=0, help="prompt plus answer (default: the context)")
    add(
        "--targets",
        type=Path,
        metavar="TARGETS.json",
        help="what to judge by, from `bench serve --calibrate` (default: what tiers promise by "
        "default)",
    )
    add(
        "--warmup",
        type=flag(seconds),
        default=0.0,
        metavar="SECONDS",
        help="arrivals left out (default: none)",
    )
    add(
        "--drain",
        type=flag(seconds),
        default=None,
        metavar="SECONDS",
        help="break off what is not answered so long after the last arrival; it counts as missed "
        "(default: wait for all)",
    )
    add(
        "--canary",
        type=flag(seconds),
        default=0.0,
        metavar="SECONDS",
        help="a short request every ... (default: none)",
    )
    add("--small-samples", action="store_true", help="print P99 from fewer than 1,000 samples too")


def check_load(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for what could not be sent, or not be judged, whoever answers."""
    spec = _workload(args, 0)
    if not sum(1 for _ in generate(spec)):
        raise ConfigError(f"--trace {args.trace}: nothing arrives in {spec.duration_s:g} s.")
    targets = targets_of(args)
    if targets is not None:
        tiers = {tier for stream in spec.streams for tier in stream.tiers}
        for tier in sorted(tiers | {canary.TIER} if args.canary else tiers):
            targets.of(tier, 1)


def _workload(args: argparse.Namespace, context: int) -> MixSpec:
    return read_source(
        args.trace,
        rate_per_s=args.rate,
        duration_s=args.duration,
        seed=args.seed,
        tiers=dict(args.tiers),
        max_total_tokens=args.max_tokens or context,
    )


def targets_of(args: argparse.Namespace) -> Targets | None:
    return None if args.targets is None else load_targets(args.targets)


async def find(args: argparse.Namespace, url: str) -> tuple[Endpoint, int]:
    """The server at `url`, and its context."""
    return await find_endpoint(url, args.model, args.api_key, sends_tiers=not args.no_tiers)


def send_load(
    args: argparse.Namespace,
    endpoint: Endpoint,
    context: int,
    events: Path | None = None,
    *,
    says_what: bool = True,
) -> Outcome:
    """Say what is sent, unless that was done before; send it, showing how far it is."""
    spec = _workload(args, context)
    items = list(generate(spec))
    if says_what:
        note(load_words(args.trace, items, spec.duration_s, args.drain))
    arrivals = items
    if args.canary:
        arrivals = canary.with_canaries(items, args.canary, spec.duration_s)
    with _Meter(spec.duration_s) as meter, asyncio.Runner(loop_factory=loop_factory()) as runner:
        outcome = runner.run(
            run_load(
                endpoint,
                arrivals,
                vocab_size=args.vocab,
                targets=targets_of(args),
                warmup_s=args.warmup,
                events=events,
                on_progress=meter.show,
                small_samples=args.small_samples,
                drain_s=args.drain,
            )
        )
    if not outcome.state.num_done and not outcome.state.num_refused:
        why = ", ".join(outcome.state.errors) or "none within --drain, which may be longer"
        raise NitsumError(f"No request was answered ({why}).")
    return outcome


def load_words(
    trace: str, items: Sequence[WorkItem], duration_s: float, drain_s: float | None
) -> str:
    """What will be sent, and when it ends."""
    num_prompt = sum(item.num_prompt for item in items)
    num_output = sum(item.num_output for item in items)
    chains = "; the later calls of chains follow" if any(item.chain for item in items) else ""
    end = "once all are answered, however late (--drain sets a limit)"
    if drain_s is not None:
        end = f"{drain_s:g} s later at most"
    return (
        f"Sending {trace}: {len(items):,} requests in {duration_s:g} s "
        f"({len(items) / duration_s:.2g}/s), {num_prompt:,} prompt and {num_output:,} answer "
        f"tokens{chains}. It ends {end}."
    )


class _Meter:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, duration_s: float) -> None:
        self._console = Console(stderr=True)
        columns = (BarColumn(bar_width=10), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("load", total=duration_s)
        self._duration_s = duration_s
        self._start_s = self._line_s = time.monotonic()

    def __enter__(self) -> _Meter:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, state: LoadState) -> None:
        now = time.monotonic()
        text = progress_words(state, is_all_sent=now - self._start_s > self._duration_s)
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, completed=now - self._start_s)
        elif now - self._line_s >= _LINES_EVERY_S:
            self._line_s = now
            print(f"{now - self._start_s:5.0f} s  {text}", file=sys.stderr, flush=True)


def progress_words(state: LoadState, *, is_all_sent: bool) -> str:
    """How far a load is; what is rare is named only if it happened."""
    parts = [
        "all sent" if is_all_sent else f"sent {state.num_sent}",
        f"open {state.num_open}",
        f"done {state.num_done}",
        f"refused {state.num_refused}" if state.num_refused else "",
        f"failed {state.num_failed}" if state.num_failed else "",
        f"{state.num_tokens} tokens",
    ]
    return ", ".join(part for part in parts if part)


def write_figures(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
