"""Writes the published figures into `docs/benchmarks.md`: `python -m benchmarks.page`.

What is filled in, each with as many decimals as stand there:
* after `Source: [name](.../summary.json)`: date, hardware, versions and command of that result,
* below it, table columns headed by the name of a figure, `{}` in it being the row's first cell, and
  columns headed `measured`, where the first cell is the name,
* `outcome`, from the row's last figure and a `target` such as "at most 30",
* anywhere, a link to a summary that is titled with a figure's name: `[1.51](SUMMARY "name")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"

SOURCE = re.compile(r"Source: \[[^]]+\]\(([^)\s]+/summary\.json)\)")
CITED = re.compile(r'\[([^]]+)\]\(([^)\s]+/summary\.json) "([^"]+)"\)')
NAMED = re.compile(r"`([^`]*\{\}[^`]*)`")
TARGET = re.compile(r"at (most|least) ([\d.e-]+)")


def filled(page: str) -> str:
    """Raises `KeyError` with the name of a figure that a summary does not have."""
    figures: Mapping[str, float] = {}
    header: list[str] = []
    lines: list[str] = []
    for line in page.splitlines():
        if found := SOURCE.match(line):
            summary = _summary(found[1])
            figures, line = summary["figures"], f"{found[0]}, {_origin(summary)}"
        elif not line.startswith("|"):
            header = []
        elif not header:
            header = _cells(line)
        elif not line.startswith("| ---"):
            cells = _row(header, _cells(line), figures)
            line = "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"
        lines.append(CITED.sub(_cited, line))
    return "\n".join(lines) + "\n"


def like(shown: str, value: float) -> str:
    """`value` with the decimals and the unit of `shown`: "37%", "1,155.0", "2.3e-08"."""
    if shown.endswith("%"):
        return like(shown[:-1], 100 * value) + "%"
    if "e" in shown:
        return f"{value:.1e}"
    return f"{value:,.{len(shown.partition('.')[2])}f}"


def outcome(value: float, target: str) -> str:
    """Met or missed, and by how much of the target."""
    found = TARGET.search(target)
    if found is None:
        return ""
    aim = float(found[2])
    met = value <= aim if found[1] == "most" else value >= aim
    if aim == 0 or value == aim:
        return "met" if met else "**missed**"
    if value > 2 * aim:
        return f"{'met' if met else '**missed**'}, {value / aim:.1f} times it"
    return f"{'met' if met else '**missed**'} by {abs(value / aim - 1):.1%}"


def _row(header: list[str], cells: list[str], figures: Mapping[str, float]) -> list[str]:
    label = cells[0].strip("`").replace(",", "").replace(".", "_")
    value = None
    for place, head in enumerate(header):
        named = NAMED.search(head)
        if named or head == "measured":
            name = named[1].format(label) if named else label
            value = figures[name]
            cells[place] = like(cells[place], value)
        elif head == "outcome" and value is not None:
            cells[place] = outcome(value, cells[header.index("target")])
    return cells


def _cited(link: re.Match[str]) -> str:
    shown, path, name = link.groups()
    return f'[{like(shown, _summary(path)["figures"][name])}]({path} "{name}")'


def _origin(summary: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"{summary['date']}, {summary['hardware']}; {versions}: `` {summary['command']} ``"


def _summary(path: str) -> dict[str, Any]:
    return json.loads((PAGE.parent / path).read_text(encoding="utf-8"))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
