"""`nitsum report`: who was served how well, what it cost them, what the machine earned."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import time
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nitsum.cli.build import default_data_dir, ledger_of
from nitsum.errors import ConfigError
from nitsum.ledger.records import NANO
from nitsum.ledger.report import Line, Report, build_report, to_json
from nitsum.ledger.store import RECORDS, Store
from nitsum.tier import DEFAULT_TIERS

_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_ORDER = tuple(tier.name for tier in DEFAULT_TIERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ledger",
        metavar="PATH|URL",
        default=os.environ.get("NITSUM_LEDGER", ""),
        help="as given to `nitsum serve` (default: the one it keeps by default)",
    )
    parser.add_argument("--data-dir", default=os.environ.get("NITSUM_DATA_DIR", ""), metavar="DIR")
    parser.add_argument(
        "--since", type=_moment, metavar="WHEN", help="24h, 7d, or 2030-01-31T12:00"
    )
    parser.add_argument("--until", type=_moment, metavar="WHEN", help="the same")
    parser.add_argument("--tenant", help="only this one")
    parser.add_argument("--json", action="store_true", help="as JSON, money in currency units")


def run(args: argparse.Namespace) -> int:
    """Print the statement; status 0 also when there is nothing to tell."""
    report = read_report(args)
    print(to_json(report)) if args.json else print_report(report, Console())
    return 0


def read_report(args: argparse.Namespace) -> Report:
    where = ledger_of(args.ledger, Path(args.data_dir) if args.data_dir else default_data_dir())
    if not where or ("://" not in where and not Path(where).exists()):
        raise ConfigError(f"There is no ledger {where or args.ledger!r} yet. Name one: --ledger.")
    store = Store(where)
    try:
        c = RECORDS.c
        wanted = [
            *([c.at_ms >= args.since] if args.since is not None else []),
            *([c.at_ms < args.until] if args.until is not None else []),
            *([c.tenant == args.tenant] if args.tenant is not None else []),
        ]
        return build_report(
            store.records(*wanted),
            store.runs(),
            tier_order=_ORDER,
            since_ms=args.since,
            until_ms=args.until,
        )
    finally:
        store.close()


def print_report(report: Report, console: Console) -> None:
    """A table by tenant and tier, and below it what the machine earned."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("tenant", "tier"):
        table.add_column(name, min_width=8, overflow="fold")
    for name in ("calls", "refused", "input", "output", "met", "price", "credit"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in report.lines:
        table.add_row(line.tenant or "-", line.tier, *_cells(line))
    table.add_section()
    table.add_row("all", "", *_cells(report.total))
    console.print(table)
    for sentence in _sentences(report):
        console.print(sentence, highlight=False, soft_wrap=True)


def _cells(line: Line) -> tuple[str, ...]:
    counts = (
        line.num_requests - line.num_refused,
        line.num_refused,
        line.num_prompt_tokens,
        line.num_output_tokens,
    )
    attained = "-" if line.attainment is None else f"{line.attainment:.1%}"
    return (
        *(f"{count:,}" for count in counts),
        attained,
        _money(line.cost_nano),
        _money(line.credit_nano),
    )


def _sentences(report: Report) -> list[str]:
    total = report.total
    earned = total.cost_nano - total.credit_nano
    found = [
        f"Earned {_money(earned)} (price less credit); at one flat price the same requests would "
        f"have earned {_money(total.flat_nano)}.",
        f"{total.num_downgraded} served as a lower tier than they asked for, {total.num_aborted} "
        f"left by their client, {total.num_errors} failed (not billed).",
    ]
    tiered, flat = report.per_hour(earned), report.per_hour(total.flat_nano)
    if tiered is not None and flat is not None:
        what = "GPU-hour" if report.devices == ["cuda"] else "rank-hour"
        found.append(
            f"{report.gpu_hours:.3f} {what}s: {tiered:.4g} per {what} with tiers, {flat:.4g} flat."
        )
    if not total.cost_nano and total.num_output_tokens:
        found.append("Prices were 0: give --price-input and --price-output to nitsum serve.")
    return found


def _money(nano: int) -> str:
    return f"{nano / NANO:,.6f}".rstrip("0").rstrip(".")


def _moment(text: str) -> int:
    """So long ago, or a date and time here; Unix milliseconds."""
    match = re.fullmatch(r"(\d+)([mhdw])", text)
    if match is not None:
        return round((time.time() - int(match[1]) * _UNITS_S[match[2]]) * 1000)
    try:
        return round(datetime.datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        raise argparse.ArgumentTypeError("24h, 7d or a date is expected") from None
