"""Progress of a long run on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

OnStage = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""
EVERY_S = 5.0
"""Elsewhere than on a terminal, a stage that goes on says so this often."""


class Stages:
    """`OnStage` and `Note` for people."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console = console
        self._bar = bar
        self._task = bar.add_task("", total=None, start=True) if console.is_terminal else None
        self._stage = ""
        self._said_s = 0.0

    def note(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, soft_wrap=True)

    def stage(self, title: str, num_done: int, num_all: int) -> None:
        """`num_done` of `num_all` parts of what `title` says are done."""
        if self._task is not None:
            self._bar.update(self._task, description=title, completed=num_done, total=num_all)
        elif title != self._stage or time.monotonic() - self._said_s > EVERY_S:
            self._stage, self._said_s = title, time.monotonic()
            self.note(f"{title} ({num_done} of {num_all})")


@contextmanager
def stages() -> Iterator[Stages]:
    """The bar goes away at the end."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    if not console.is_terminal:
        yield Stages(console, bar)
        return
    with bar:
        yield Stages(console, bar)
