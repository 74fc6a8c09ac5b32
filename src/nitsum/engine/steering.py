"""What the controller sees of the engine, and the one thing it may do to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nitsum.control.controller import Held
from nitsum.events import AnyEvent, EventSink
from nitsum.plan import Plan

if TYPE_CHECKING:
    from nitsum.engine.core import Core


class Steering:
    """A controller's `View` of a core."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def now(self) -> float:
        return self._core.clock.now()

    def emit(self, event: AnyEvent) -> None:
        self._core.sink.emit(event)

    @property
    def plan(self) -> Plan:
        return self._core.generation.switcher.plan

    @property
    def may_switch(self) -> bool:
        return self._core.generation.switcher.current is None and not self._core.draining

    def waiting(self) -> Iterator[tuple[str, float]]:
        for sequence in self._core.sequences.values():
            if sequence.first_scheduled_s is None:
                yield sequence.tier, sequence.request.arrival_s

    def held(self) -> list[Held]:
        generation = self._core.generation
        lanes = [(group, generation.sequences_on(group)) for group in generation.loops]
        return [
            Held(group, len(sequences), sum(sequence.num_dispatched for sequence in sequences))
            for group, sequences in lanes
        ]

    @property
    def token_bytes(self) -> int:
        arena = self._core.arena
        return arena.unit_bytes * arena.units_per_block // arena.block_tokens

    def go_to(self, op_id: str, plan: str, reason: str) -> None:
        self._core.switch(op_id, plan, reason)


class BothSinks:
    """Events for whoever wants them, and for the controller."""

    def __init__(self, first: EventSink, second: EventSink) -> None:
        self.first, self.second = first, second

    def emit(self, event: AnyEvent) -> None:
        self.first.emit(event)
        self.second.emit(event)
