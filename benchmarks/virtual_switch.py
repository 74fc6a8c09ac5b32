"""`nitsum bench switch` in virtual time: what of a switch's pauses is decided by the engine.

The same streams, arena and switches as on the machine it names, over ranks that only pass the time
a cost model gives them. What Python takes is not in it (`python -m nitsum.bench.turns` has that),
nor are copies that slow steps down. A step's time and the order of steps are.

    python -m benchmarks.virtual_switch --model FOLDER [--switches 10]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nitsum.bench.driver import Driver
from nitsum.bench.switch import Result, Run
from nitsum.bench.switch_load import Options, engine_config
from nitsum.bench.virtual import VirtualMachine
from nitsum.cost.machines import Machine
from nitsum.metrics.records import Recorder
from nitsum.plan import read_plans
from nitsum.shape import ModelShape

GIB = 1 << 30


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
        device="cuda",
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
