"""`nitsum explain EVENTS.jsonl`: why the layout changed, or did not, in words."""

from __future__ import annotations

import argparse
from pathlib import Path

from nitsum.control.decisions import summary, told
from nitsum.metrics.eventfile import read_events


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("events", help="what serve --events or simulate --events wrote")
    parser.add_argument(
        "--all", action="store_true", help="also decisions to stay, and those without regret"
    )


def run(args: argparse.Namespace) -> int:
    """Print decisions in order of time, then the run in one line."""
    events = list(read_events(Path(args.events)))
    for paragraph in told(events, all_windows=args.all):
        print(paragraph)
    print(summary(events))
    return 0
