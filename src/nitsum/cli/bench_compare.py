"""`nitsum bench compare`: several servers under the same arrivals, turn by turn."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from rich.console import Console

from nitsum.bench.compare import (
    Side,
    compare,
    comparison_table,
    note_lines,
    ratios,
    read_sides,
)
from nitsum.bench.provenance import summary
from nitsum.cli.loading import (
    add_workload_arguments,
    check_load,
    find,
    send_load,
    write_figures,
)
from nitsum.cli.progress import note
from nitsum.cli.readers import check_positive
from nitsum.metrics.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sides",
        nargs="+",
        metavar="NAME=URL|FLAGS",
        help="a server that runs, or what `nitsum serve` is started with, quoted",
    )
    add_workload_arguments(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="turns of each side (default: 3)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write all figures")


def run(args: argparse.Namespace) -> int:
    """The same arrivals to every side, turn by turn."""

    notes: dict[str, list[str]] = {}

    def measure(side: Side, url: str, number: int) -> Report:
        is_first = not notes
        note(f"Round {number + 1}: {side.name} at {url}")
        endpoint, context = asyncio.run(find(args, url))
        report = send_load(args, endpoint, context, says_what=is_first).report
        notes[side.name] = report.notes
        return report

    check_positive(args, "rounds")
    sides = read_sides(args.sides)
    check_load(args)
    results = compare(sides, args.rounds, measure)
    console = Console()
    console.print(comparison_table(results))
    for line in note_lines(notes):
        console.print(line, style="dim", highlight=False)
    if args.json is not None:
        write_figures(args.json, _comparison(results))
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
