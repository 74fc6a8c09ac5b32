"""What the controller sees of the engine, and the one thing it may do to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nitsum.config import EngineConfig
from nitsum.control.controller import Controller, Rules
from nitsum.control.decisions import words
from nitsum.control.price import Held
from nitsum.control.score import Limits, Scorer
from nitsum.control.steps import StepTimes
from nitsum.cost.protocol import CostModel
from nitsum.events import AnyEvent
from nitsum.kv.cache import ArenaShape
from nitsum.messages import Decision
from nitsum.plan import Group, Plan
from nitsum.tier import TierSet

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

    @property
    def factors(self) -> dict[int, float]:
        return self._core.cost.factors

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


def controller_of(
    config: EngineConfig, arena: ArenaShape, cost: CostModel, rules: Rules | None = None
) -> Controller | None:
    """A controller over the resident plans; None when there is nothing to choose, or it is off."""
    if config.controller == "static" or len(config.plans.plans) < 2:
        return None
    return new_controller(config, arena, cost, rules)


def new_controller(
    config: EngineConfig, arena: ArenaShape, cost: CostModel, rules: Rules | None = None
) -> Controller:
    """A controller over the resident plans, whatever the configuration asks for."""

    def kv_tokens(degree: int) -> float:
        pages = arena.num_units // arena.page_units(Group(degree, 0))
        return float(pages * arena.block_tokens)

    limits = Limits(config.max_num_seqs, config.mixed_tokens, kv_tokens)
    scorer = Scorer(StepTimes(cost, config.plans.degrees), limits)
    return Controller(config.plans, TierSet(config.tiers), scorer, cost, rules)


def decisions_of(controller: Controller | None, num: int) -> list[Decision]:
    """The last `num` decisions and judgements, the newest last."""
    if controller is None or num < 1:
        return []
    return [Decision(event, words(event)) for event in list(controller.recent)[-num:]]
