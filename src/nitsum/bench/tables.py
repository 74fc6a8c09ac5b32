"""Results as tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column names things; the others are figures."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        justify = "right" if index else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def print_line(text: str, style: str = "") -> None:
    _console().print(text, style=style, markup=False, soft_wrap=True)


def _console() -> Console:
    """Wide enough for a table where nobody says how wide the page is."""
    width = None if sys.stdout.isatty() else 110
    return Console(highlight=False, width=width)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"
