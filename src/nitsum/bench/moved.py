"""What switches did to requests: who was moved in which state, and how full the arena was.

States are read before each turn of the core: a turn cuts requests over before it composes steps, so
what a request was before the turn is what it was when it left its lane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nitsum.bench.scenario import Ask
from nitsum.engine.core import Core
from nitsum.events import (
    AnyEvent,
    GenerationStarted,
    HandedOver,
    Routed,
    Started,
    SwitchEnded,
)
from nitsum.plan import Group, PlanSet
from nitsum.sequence import SeqState, Sequence

MovedIn = Literal["prefill", "decode", "paused"]


class _Place(NamedTuple):
    """Where a request's KV was before a turn."""

    sequence: Sequence
    group: Group
    state: MovedIn
    num_dispatched: int
    num_restarts: int


@dataclass
class MoveWatch:
    """A `Watcher` and an `EventSink` in one."""

    asks: Mapping[str, Ask]
    plans: PlanSet
    moved: Counter[str] = field(default_factory=Counter[str])
    """Requests whose KV changed lanes by a switch, by the state they were in."""
    num_handed_over: int = 0
    """Requests that a prefill lane gave to another."""
    num_prefix_hits: int = 0
    """Requests that began with cached KV which was brought into their lane's layout, not computed
    in it."""
    num_recomputed: int = 0
    """Times a request gave up its KV for lack of room."""
    num_restarts: int = 0
    highest_use: float = 0.0
    """Of any rank's arena by requests, cached blocks without user not counted."""
    use_at_switch: list[float] = field(default_factory=list[float])
    """Mean over the ranks when each switch began."""
    _places: dict[str, _Place] = field(default_factory=dict[str, _Place])
    _computed: set[tuple[Group, int]] = field(default_factory=set[tuple[Group, int]])
    """Lanes that may have computed a family's prefix themselves since they were opened."""
    _started: set[str] = field(default_factory=set[str])
    _was_switching: bool = False

    # -- around each turn --

    def before(self, core: Core) -> None:
        self._places = {
            sequence.request_id: _Place(
                sequence,
                sequence.group,
                state_of(sequence),
                sequence.num_dispatched,
                sequence.num_restarts,
            )
            for sequence in core.sequences.values()
            if sequence.group is not None and holds_kv(sequence)
        }
        status = core.status("watch")
        self.highest_use = max(self.highest_use, *status.kv_used)
        is_switching = status.switching_to is not None
        if is_switching and not self._was_switching:
            self.use_at_switch.append(sum(status.kv_used) / len(status.kv_used))
        self._was_switching = is_switching

    def after(self, core: Core) -> None:
        for request_id, place in self._places.items():
            sequence = place.sequence
            if sequence.num_restarts != place.num_restarts:
                self.num_recomputed += 1
            elif sequence.group != place.group and not sequence.is_finished:
                if sequence not in core.generation.hand_overs.open:
                    self.moved[place.state] += 1
                self._note_unfinished_prefix(request_id, place)

    def _note_unfinished_prefix(self, request_id: str, place: _Place) -> None:
        """Moved before its prefix was complete: its new lane computes the rest of it."""
        ask = self.asks[request_id]
        if place.num_dispatched < ask.num_prefix and place.sequence.group is not None:
            self._note_computed(request_id, place.sequence.group)

    # -- events --

    def emit(self, event: AnyEvent) -> None:
        match event:
            case Started():
                self._note_start(event)
            case Routed() if event.request_id in self._started:
                self._note_computed(event.request_id, event.group)
            case SwitchEnded():
                self._forget_closed(event.to_plan)
            case HandedOver():
                self.num_handed_over += 1
            case GenerationStarted():
                self.num_restarts += 1
                self._computed.clear()
            case _:
                pass

    def _note_start(self, event: Started) -> None:
        ask = self.asks[event.request_id]
        self._started.add(event.request_id)
        if event.num_cached and (event.group, ask.family) not in self._computed:
            self.num_prefix_hits += 1
        if event.num_cached < ask.num_prefix:
            self._note_computed(event.request_id, event.group)

    def _note_computed(self, request_id: str, group: Group) -> None:
        family = self.asks[request_id].family
        if family is not None:
            self._computed.add((group, family))

    def _forget_closed(self, plan: str) -> None:
        """A closed lane's layout keeps no KV."""
        open_groups = set(self.plans[plan].groups)
        self._computed = {entry for entry in self._computed if entry[0] in open_groups}


def holds_kv(sequence: Sequence) -> bool:
    return sequence.num_dispatched > 0


def state_of(sequence: Sequence) -> MovedIn:
    if sequence.state is SeqState.PAUSED:
        return "paused"
    return "prefill" if sequence.in_prefill else "decode"
