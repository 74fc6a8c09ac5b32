"""Progress on standard error: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_console = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line."""
    _console.print(text, markup=False, soft_wrap=True)


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Show that `title` is under way, and how long it took once it is done."""
    start_s = time.monotonic()
    if _console.is_terminal:
        with _console.status(title):
            yield
    else:
        note(f"{title} ...")
        yield
    note(f"{title}: done in {time.monotonic() - start_s:.1f} s")
