"""The same arrivals against several servers, turn by turn, with ratios and their spread."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryFile
from typing import IO, NamedTuple

from rich.table import Table

from nitsum.errors import ConfigError, NitsumError
from nitsum.metrics.figures import figures
from nitsum.metrics.report import Report

_LABELS = {
    "goodput_requests_per_s": "goodput, 1/s",
    "attainment_share": "share in time",
    "output_tokens_per_s": "output tokens/s",
}
_SHOWN = re.compile(
    rf"((?P<tier>.*)_)?((?P<figure>{'|'.join(_LABELS)})|(?P<time>ttft|tpot)_p(?P<percent>50|99)_s)"
)
_STOP_S = 60.0
_LAST_LINES = 20


@dataclass(frozen=True)
class Side:
    """One of the things compared: a server that runs, or flags to start ours with."""

    name: str
    url: str = ""
    serve_flags: tuple[str, ...] = ()


def read_sides(entries: Sequence[str]) -> list[Side]:
    """`NAME=http://...` for a server that runs; `NAME=MODEL --flag ...` starts `nitsum serve`."""
    sides = [_read_side(entry) for entry in entries]
    if len({side.name for side in sides}) < max(2, len(sides)):
        raise ConfigError("Give at least two sides, each with a name of its own: NAME=URL|FLAGS.")
    return sides


def _read_side(entry: str) -> Side:
    name, equals, value = entry.partition("=")
    if not (name and equals and value):
        raise ConfigError(f"{entry!r} is not NAME=URL or NAME='MODEL --flag ...'.")
    if re.match(r"https?://", value):
        return Side(name, url=value)
    return Side(name, serve_flags=tuple(shlex.split(value)))


@contextmanager
def running(side: Side, *, is_quiet: bool = False) -> Iterator[str]:
    """The side's URL; a server started for it ends with the context.

    What a quiet one logs is kept back, and told only if it ends before it listens.
    """
    if side.url:
        yield side.url
        return
    command = [sys.executable, "-m", "nitsum.cli", "serve", *side.serve_flags, "--port", "0"]
    with TemporaryFile("w+") if is_quiet else nullcontext() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = _listening(process)
            if url is None:
                raise NitsumError(_ended_early(side.name, log))
            yield url
        finally:
            _end(process)


def _listening(process: subprocess.Popen[str]) -> str | None:
    """Where it listens; None if it has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"at (http://\S+)", line):
            return found[1]
    return None


def _ended_early(name: str, log: IO[str] | None) -> str:
    said = "see its messages above."
    if log is not None:
        log.seek(0)
        said = "it said:\n" + "".join(log.readlines()[-_LAST_LINES:]).rstrip()
    return f"The server of {name!r} ended before it listened; {said}"


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


Measure = Callable[[Side, str, int], Report]
"""(side, its URL, round) -> report"""


def compare(
    sides: Sequence[Side], num_rounds: int, measure: Measure
) -> dict[str, list[dict[str, float]]]:
    """Figures of every round by side. Sides take turns, in opposite order every other round."""
    results: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(num_rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            with running(side, is_quiet=True) as url:
                results[side.name].append(figures(measure(side, url, number)))
    return results


def ratios(results: dict[str, list[dict[str, float]]], figure: str) -> dict[str, list[float]]:
    """Each side's figure over the first side's, round by round; rounds without either are left
    out."""
    names = list(results)
    base = results[names[0]]
    return {
        name: [
            other[figure] / first[figure]
            for other, first in zip(results[name], base, strict=True)
            if other.get(figure) is not None and first.get(figure)
        ]
        for name in names[1:]
    }


def comparison_table(results: dict[str, list[dict[str, float]]]) -> Table:
    """Medians over the rounds with their range; ratios to the first side. A line for each side."""
    names = list(results)
    table = Table()
    table.add_column("figure", overflow="fold")
    table.add_column("side", overflow="fold")
    table.add_column("median (range)", justify="right", overflow="fold")
    table.add_column(f"over {names[0]}", justify="right", overflow="fold")
    for figure in _all_figures(results):
        found = _shown(figure)
        if found is not None:
            _add_rows(table, results, figure, found)
    return table


def _add_rows(
    table: Table, results: dict[str, list[dict[str, float]]], figure: str, shown: Shown
) -> None:
    over = ratios(results, figure)
    for name, rounds in results.items():
        values = [shown.scale * run[figure] for run in rounds if figure in run]
        label = "" if name in over else shown.label
        table.add_row(label, name, _spread(values), _spread(over[name]) if name in over else "")
    table.add_section()


class Shown(NamedTuple):
    """A figure as the table has it."""

    label: str
    scale: float


def _shown(figure: str) -> Shown | None:
    """None for figures that are left to the JSON."""
    match = _SHOWN.fullmatch(figure)
    if match is None:
        return None
    tier = f"{match['tier']} " if match["tier"] else ""
    if match["time"]:
        return Shown(f"{tier}{match['time'].upper()} P{match['percent']}, ms", 1e3)
    return Shown(tier + _LABELS[match["figure"]], 1.0)


def note_lines(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes by side as lines: what all sides have in common once, the rest with its side."""
    each = [set(of_side) for of_side in notes.values()]
    common = set[str]().union(*each).intersection(*each)
    every = dict.fromkeys(said for of_side in notes.values() for said in of_side)
    return [f"note: {said}" for said in every if said in common] + [
        f"note, {side}: {said}"
        for side, of_side in notes.items()
        for said in of_side
        if said not in common
    ]


def _all_figures(results: dict[str, list[dict[str, float]]]) -> list[str]:
    runs = [run for rounds in results.values() for run in rounds]
    return list(dict.fromkeys(figure for run in runs for figure in run))


def _spread(values: Iterable[float]) -> str:
    ordered = sorted(values)
    if not ordered:
        return "-"
    if len(ordered) == 1:
        return f"{ordered[0]:.3g}"
    return f"{median(ordered):.3g} ({ordered[0]:.3g}..{ordered[-1]:.3g})"
