"""`nitsum bench soak`: clients and switches without rest; nothing may fail, stick or grow."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from functools import partial

from nitsum.bench.compare import Side, running
from nitsum.bench.process_memory import resident_bytes
from nitsum.bench.provenance import summary
from nitsum.bench.soak import Options, Result, open_client, soak
from nitsum.bench.stages import stages
from nitsum.bench.tables import percent, print_line, print_table, size
from nitsum.cli.readers import check_positive
from nitsum.errors import ConfigError

GROWTH = 0.05
"""Share by which memory may grow in the last third of a run and count as flat."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="what `serve` takes: demo, or examples/tiny with --load-format dummy")  # fmt: skip
    add("--ranks", type=int, default=2, metavar="N", help="processes or GPUs (default: 2)")
    add("--plans", default="", metavar="PLAN,...", help="switched between (default: as `serve`)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add("--prompt-tokens", type=int, default=96, metavar="N", help="at most (default: 96)")
    add("--answer-tokens", type=int, default=96, metavar="N", help="at most (default: 96)")
    add("--kv-memory", default="16MiB", metavar="SIZE",
        help="arena of one rank; small enough to be full (default: 16MiB)")  # fmt: skip
    add("--duration", type=float, default=1200.0, metavar="SECONDS", help="default: 1200")
    add("--clients", type=int, default=24, metavar="N", help="requests at a time (default: 24)")
    add("--stall", type=float, default=120.0, metavar="SECONDS",
        help="without a token for so long a stream is stuck (default: 120)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="of prompts and lengths")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Status 1 when something failed, got stuck or grew."""
    if args.duration <= 0 or args.stall <= 0:
        raise ConfigError("--duration and --stall must be above 0.")
    check_positive(args, "clients", "prompt_tokens", "answer_tokens")
    options = Options(
        args.duration,
        args.clients,
        longest_prompt=args.prompt_tokens,
        longest_answer=args.answer_tokens,
        stall_s=args.stall,
        seed=args.seed,
    )
    with stages() as progress, running(Side("soak", serve_flags=serve_flags(args))) as url:
        client = open_client(url, options)
        read_memory = partial(resident_bytes, os.getpid())
        result = asyncio.run(soak(client, options, progress.stage, read_memory))
    if args.json:
        notes = (
            f"{args.ranks} ranks ({args.device}), arenas of {args.kv_memory}, "
            f"{args.clients} clients, prompts of up to {args.prompt_tokens} tokens, "
            f"answers of up to {args.answer_tokens}"
        )
        details = {"failed": result.failed, "failed_switches": result.failed_switches}
        print(json.dumps({**summary(result.figures(), notes), **details}))
    else:
        print_result(result)
    is_flat = result.memory_growth_share <= GROWTH
    return 0 if is_flat and not result.figures()["soak_failed"] else 1


def serve_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """What `nitsum serve` is started with."""
    named = ("ranks", "plans", "device", "load_format", "kv_memory")
    given = [(name, str(getattr(args, name))) for name in named if getattr(args, name)]
    flags = [word for name, value in given for word in (f"--{name.replace('_', '-')}", value)]
    return (args.model, *flags, "--log-level", "warning")


def print_result(result: Result) -> None:
    """What was done, and what went wrong."""
    figures = result.figures()
    rows = [
        ("requests", str(result.num_requests)),
        ("tokens", str(result.num_tokens)),
        ("switches", str(result.num_switches)),
        ("mean use of the arenas", percent(figures["kv_used_mean_share"])),
        ("memory of all processes", size(figures["memory_bytes"])),
        ("  grown in the last third", percent(result.memory_growth_share)),
        *((f"failed: {what}", str(count)) for what, count in sorted(result.failed.items())),
    ]
    print_table("Soak", ("", ""), rows)
    for failure in result.failed_switches[:10]:
        print_line(f"Switch failed: {failure}")
    print_line("Nothing failed." if not figures["soak_failed"] else "Something failed.")
