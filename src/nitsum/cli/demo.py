"""`nitsum demo`: chats of three tiers, and a layout that changes while they stream."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from rich.console import Console

from nitsum.bench.compare import Side, running
from nitsum.cli.demo_chats import Chats
from nitsum.cli.demo_report import print_switch, print_tiers, switch_table
from nitsum.cli.progress import note
from nitsum.metrics.eventfile import read_events
from nitsum.metrics.records import Recorder

MIN_TOKENS_BETWEEN = 60
"""Tokens that the streams of one layout show before the next switch."""
MIN_STREAMS = 4
"""Streams that run when a switch begins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", help="what `serve` takes")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="worker processes")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="chats at a time")


def run(args: argparse.Namespace) -> int:
    """Serve, chat, switch, and tell what happened."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="nitsum-demo-") as folder:
        events = Path(folder) / "events.jsonl"
        with running(_side(args.model, args.ranks, events)) as url:
            asyncio.run(_walk(console, url, args.clients))
        recorder = Recorder(read_events(events))
    console.print()
    console.print(switch_table(recorder))
    print_tiers(console, recorder)
    return 0


def _side(model: str, num_ranks: int, events: Path) -> Side:
    """`nitsum serve` in a process of its own."""
    flags = ("--ranks", str(num_ranks), "--events", str(events), "--log-level", "warning")
    flags += ("--data-dir", str(events.parent / "data"))
    return Side("demo", serve_flags=(model, *flags))


async def _walk(console: Console, url: str, num_clients: int) -> None:
    """Keep chats running, go through all plans and back to the first, let the chats finish."""
    async with Chats(url, console, num_clients) as chats:
        status = await chats.plans()
        first = status["plan"]
        names = [name for name in status["plans"] if name != first]
        note(f"Plan {first}; {num_clients} clients chat, in turn priority, default and flex.")
        for name in [*names, first]:
            await chats.until_streams(MIN_STREAMS, MIN_TOKENS_BETWEEN)
            print_switch(console, await chats.switch(name))
        await chats.until_streams(1, MIN_TOKENS_BETWEEN)
        note("All plans were served; the chats that run are finished, no new ones begin.")
