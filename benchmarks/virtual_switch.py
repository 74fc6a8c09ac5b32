"""`nitsum bench switch` in virtual time: what of a switch's pauses is decided by the engine.

The same streams, arena and switches as on the machine it names, over ranks that only pass the time
a cost model gives them. What Python takes is not in it (`python -m nitsum.bench.turns` has that),
nor are copies that slow steps down. A step's time and the order of steps are.

    python -m benchmarks.virtual_switch --switches 10
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nitsum.bench.driver import Driver
from nitsum.bench.switch import Options, Result, Run, engine_config
from nitsum.clock import VirtualClock
from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.engine.core import Core
from nitsum.kv.cache import ArenaShape
from nitsum.metrics.records import Recorder
from nitsum.plan import read_plans
from nitsum.shape import Geometry, ModelShape
from nitsum.sim.executor import SimExecutor

GIB = 1 << 30


class VirtualMachine:
    """Ranks in virtual time."""

    def __init__(self, config: EngineConfig, shape: ModelShape, machine: Machine) -> None:
        geometry = Geometry(shape, config.max_tp, config.min_tp)
        unit_bytes = geometry.unit_bytes(config.block_tokens, 2)
        self.arena = ArenaShape(
            num_ranks=config.num_ranks,
            num_units=config.kv_bytes // unit_bytes,
            units_per_block=geometry.num_units,
            block_tokens=config.block_tokens,
            min_degree=config.plans.degrees[0],
            unit_bytes=unit_bytes,
        )
        self.clock = VirtualClock()
        cost = AnalyticCost(shape, machine, max_tp=config.max_tp, min_tp=config.min_tp)
        self.executor = SimExecutor(self.arena, cost, self.clock, copies_beside=True)

    def wait(self, core: Core) -> None:
        at_s = min(self.executor.next_reply_s, core.next_dispatch_s)
        self.clock.advance_to(max(at_s, self.clock.now()))


def measure(options: Options, machine: Machine) -> Result:
    shape = ModelShape.from_folder(options.model)
    config = engine_config(options)
    recorder = Recorder()
    driver = Driver(config, VirtualMachine(config, shape, machine), recorder)
    run = Run(options, driver, recorder, shape, lambda *_: None)
    run.to_the_end()
    return run.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a config.json")
    parser.add_argument("--machine", default="2xH100")
    parser.add_argument("--switches", type=int, default=10)
    parser.add_argument("--kv-gib", type=float, default=24.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    machine = Machine.parse(args.machine)
    options = Options(
        model=args.model,
        plans=read_plans(["2xTP1", "TP2"], 2),
        dtype="bfloat16",
        fill="cache",
        kv_bytes=int(args.kv_gib * GIB),
        max_batch_tokens=1024,
        num_each_way=args.switches,
        num_streams=args.streams,
        num_prompt=2048,
        num_answer=1000,
        seed=args.seed,
    )
    print(json.dumps(measure(options, machine).figures(), indent=1))


if __name__ == "__main__":
    main()
