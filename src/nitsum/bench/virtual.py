"""A machine in virtual time for who drives a core: what the engine decides, and nothing else."""

from __future__ import annotations

from math import inf

from nitsum.clock import VirtualClock
from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.engine.core import Core
from nitsum.engine.launch import num_units
from nitsum.kv.cache import ArenaShape
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import DTYPE_BYTES
from nitsum.sim.executor import SimExecutor


class VirtualMachine:
    """Ranks that only pass the time a cost model gives their steps and copies."""

    def __init__(self, config: EngineConfig, shape: ModelShape, machine: Machine) -> None:
        """Raises `ConfigError` when not even one block fits; `config.kv_bytes` must be given."""
        geometry = Geometry(shape, config.max_tp, config.min_tp)
        dtype_bytes = DTYPE_BYTES[config.dtype]
        self.arena = ArenaShape(
            num_ranks=config.num_ranks,
            num_units=num_units(config, shape),
            units_per_block=geometry.num_units,
            block_tokens=config.block_tokens,
            min_degree=config.plans.degrees[0],
            unit_bytes=geometry.unit_bytes(config.block_tokens, dtype_bytes),
        )
        self.clock = VirtualClock()
        self.cost = AnalyticCost(
            shape, machine, max_tp=config.max_tp, min_tp=config.min_tp, dtype_bytes=dtype_bytes
        )
        self.executor = SimExecutor(self.arena, self.cost, self.clock, copies_beside=True)

    def wait(self, core: Core) -> None:
        at_s = min(self.executor.next_reply_s, core.next_turn_s)
        assert at_s < inf, "nothing is under way, and nothing will be"
        self.clock.advance_to(max(at_s, self.clock.now()))
