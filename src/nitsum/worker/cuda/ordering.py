"""Which units of this rank a copy beside the steps is still using, and who has to wait for it.

Steps, tails and relocations follow each other on the main stream. Pre-copies and copies from and to
host memory run beside them, so the units they write, or save, are remembered until they are done: a
step whose page differences name them, or a move that reads or writes them, waits on the device
first. Everything else goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from nitsum.messages import Move, Pages, Step

Event = TypeVar("Event")


class Precopies(Generic[Event]):
    """Units under way, by the event that ends their copy."""

    def __init__(self) -> None:
        self._events: dict[int, Event] = {}

    def add(self, units: Iterable[int], event: Event) -> None:
        self._events.update(dict.fromkeys(units, event))

    def done(self, *events: Event) -> None:
        ended = {id(event) for event in events}
        self._events = {u: e for u, e in self._events.items() if id(e) not in ended}

    def touching(self, units: Iterable[int]) -> list[Event]:
        """Events that must have happened before `units` are read or written, each once."""
        if not self._events:
            return []
        found = [self._events[unit] for unit in units if unit in self._events]
        return list({id(event): event for event in found}.values())


def concerns_host(move: Move) -> bool:
    """Whether it copies to or from host memory."""
    return bool(move.saves or move.loads)


def runs_beside_steps(move: Move, rank: int) -> bool:
    """Whether `move` is a pre-copy: it brings no rows and pulls from a peer.

    Copies inside a rank make room for steps that follow at once, and take no time worth hiding.
    """
    return not move.rows and any(pull.src_rank != rank for pull in move.pulls)


def units_of_step(step: Step, member: int, units_per_page: int) -> Iterable[int]:
    """Units of pages the step names for the first time on this rank."""
    return (unit for pages in step.pages for unit in _units(pages, member, units_per_page))


def _units(pages: Pages, member: int, units_per_page: int) -> Iterable[int]:
    for page in pages.pages[member]:
        yield from range(page * units_per_page, (page + 1) * units_per_page)


def units_of_move(move: Move, rank: int) -> Iterable[int]:
    """Units of this rank that the move reads or writes."""
    for pull in move.pulls:
        yield from pull.dst_units
        if pull.src_rank == rank:
            yield from pull.src_units
    for save in move.saves:
        yield from save.src_units
    for load in move.loads:
        yield from load.dst_units
