"""A machine in virtual time for who drives a core: what the engine decides, and nothing else."""

from __future__ import annotations

from math import inf

from nitsum.clock import VirtualClock
from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.engine.core import Core
from nitsum.engine.launch import num_units
from nitsum.engine.process import arena_of
from nitsum.messages import Ready
from nitsum.shape import ModelShape
from nitsum.shared import DTYPE_BYTES
from nitsum.sim.executor import SimExecutor


class VirtualMachine:
    """Ranks that only pass the time a cost model gives their steps and copies."""

    def __init__(self, config: EngineConfig, shape: ModelShape, machine: Machine) -> None:
        """Raises `ConfigError` when not even one block fits; `config.kv_bytes` must be given."""
        self.arena = arena_of(config, shape, [Ready(0, num_units(config, shape), {}, {})])
        self.clock = VirtualClock()
        self.cost = AnalyticCost(
            shape,
            machine,
            max_tp=config.max_tp,
            min_tp=config.min_tp,
            dtype_bytes=DTYPE_BYTES[config.dtype],
        )
        self.executor = SimExecutor(self.arena, self.cost, self.clock, copies_beside=True)

    def wait(self, core: Core) -> None:
        at_s = min(self.executor.next_reply_s, core.next_turn_s)
        assert at_s < inf, "nothing is under way, and nothing will be"
        self.clock.advance_to(max(at_s, self.clock.now()))
