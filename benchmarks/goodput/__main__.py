"""Goodput of every static layout and policy, and of ours: the table, in three commands.

    python -m benchmarks.goodput plan  [--points FILE]               # no GPU, minutes
    python -m benchmarks.goodput run   [--points FILE] --out FOLDER [--only POINT,...]
    python -m benchmarks.goodput table [--points FILE] FOLDER... [--summary FILE]

`plan` looks in the simulator for the loads that matter and writes the points to be served, with
what it predicts for them, and the targets beside it; commit both. `run` starts a server for each
side and serves it the points' arrivals, as users would, over HTTP; a point that FOLDER has already
is left out, so a run may be broken off and go on later, elsewhere. Neither `run` nor `table` takes
a model, step times, targets or results other than those of the points. `table` sets served beside
simulated and reckons the ratios; points that were not served are left out.

The 8B shape with random weights on two GPUs, `benchmarks/workloads/goodput.yaml` and
`goodput_shifting.yaml`. On a CPU: `plan --machine 2xCPU --model CHECKPOINT --mix
SMALL.yaml`, then `run --model CHECKPOINT`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from benchmarks.goodput import serve, table
from benchmarks.goodput.basis import basis_of, source_digest
from benchmarks.goodput.foresee import Foresight, foresee
from benchmarks.goodput.points import (
    Mixes,
    Points,
    Side,
    device_s,
    groups,
    load_points,
    only_priority,
    save,
)
from benchmarks.gpu_serve import FRONT_DOOR_S, HOST_LATENCY_S
from nitsum import __file__ as package
from nitsum.cli.readers import seconds
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.cost.shipped import chosen_cost
from nitsum.errors import NitsumError
from nitsum.limits import DTYPES
from nitsum.metrics.targets import held_to, save_targets
from nitsum.sim.run import Options
from nitsum.sim.system import Site, site_targets, uniform_plan
from nitsum.workload.spec import MixSpec, load_mix

HERE = Path(__file__).parent
WORKLOADS = HERE.parent / "workloads"


def plan(args: argparse.Namespace) -> None:
    """Simulate, choose, write the points and the targets."""
    site, mixes = _site(args), _mixes(args)
    targets = site_targets(site)
    args.points.parent.mkdir(parents=True, exist_ok=True)
    save_targets(targets, targets_of(args.points))
    widest = [uniform_plan(site.num_ranks, degree).name for degree in _degrees(site)]
    foresight = Foresight(
        site=replace(site, tiers=held_to(site.tiers, targets)),
        targets=targets,
        mixes=mixes,
        options=Options(
            front_door_s=FRONT_DOOR_S, host_latency_s=HOST_LATENCY_S, drain_s=args.drain
        ),
        warmup_s=args.warmup,
        folder=args.runs,
        code=source_digest([*HERE.glob("*.py"), *Path(package).parent.rglob("*")]),
        note=_say,
    )
    found = foresee(foresight, widest, Side(plans=widest, policy="nitsum", adaptive=True))
    file = Points(
        date=datetime.now(UTC).date().isoformat(),
        command=_command(),
        machine=args.machine,
        device=site.machine.device,
        num_ranks=site.num_ranks,
        basis=basis_of(site, targets),
        mixes=mixes,
        warmup_s=args.warmup,
        drain_s=args.drain,
        saturation_per_s=found.saturation_per_s,
        alone_capacity=found.alone_capacity,
        points=found.points,
        runs=found.runs,
    )
    save(file, args.points)
    _show(file)


def _site(args: argparse.Namespace) -> Site:
    shape, machine = shape_named(args.model), Machine.parse(args.machine)
    dtype = DTYPES[machine.device]
    return Site(
        model=args.model,
        shape=shape,
        machine=machine,
        dtype=dtype,
        max_model_len=load_mix(args.mix).max_total_tokens,
        cost=chosen_cost(args.cost, shape, machine, dtype),
    )


def _mixes(args: argparse.Namespace) -> dict[Mixes, MixSpec]:
    mixed, shifting = load_mix(args.mix), load_mix(args.shifting)
    mixed = msgspec.structs.replace(mixed, duration_s=args.warmup + args.seconds)
    return {"mixed": mixed, "shifting": shifting, "alone": only_priority(mixed)}


def _degrees(site: Site) -> list[int]:
    """Of uniform static layouts, the widest first."""
    degrees = [1 << bit for bit in range(site.num_ranks.bit_length())]
    return [degree for degree in reversed(degrees) if degree >= site.narrowest]


def targets_of(points: Path) -> Path:
    """The file of targets that goes with a file of points."""
    return points.with_name("targets.json")


def _show(file: Points) -> None:
    """What serving takes."""
    for group in groups(file.points):
        _say(f"{group[0].side.name}: a server of its own")
        for point in group:
            _say(f"  {point.name:26} load {point.load:6.2f}/s, {file.seconds(point):4.0f} s")
    _say(f"all {len(file.points)} points: {device_s(file, file.points):.0f} s of device time")


def run(args: argparse.Namespace) -> None:
    file = load_points(args.points)
    chosen = file.chosen([name for name in args.only.split(",") if name])
    serve.run(
        serve.Job(
            file=file,
            targets=targets_of(args.points),
            out=args.out,
            model=args.model,
            cost=args.cost,
            command=_command(),
            flags=args.flags.split(),
        ),
        chosen,
    )


def show_table(args: argparse.Namespace) -> None:
    file = load_points(args.points)
    table.show(file, table.read(file, args.folders), args.summary, _command())


def _command() -> str:
    return " ".join(["python -m benchmarks.goodput", *sys.argv[1:]])


def _say(line: str) -> None:
    print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.goodput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = made.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--points", type=Path, default=HERE / "points.json", metavar="FILE")
    part = parts.add_parser("plan", parents=[shared], help="find the points, in the simulator")
    part.set_defaults(does=plan)
    part.add_argument("--model", default="Llama-3.1-8B", help="a shape's name or a checkpoint")
    part.add_argument("--machine", default="2xH100-80GB")
    part.add_argument("--cost", default="", help="a measured table (default: the shipped one)")
    part.add_argument("--mix", type=Path, default=WORKLOADS / "goodput.yaml")
    part.add_argument("--shifting", type=Path, default=WORKLOADS / "goodput_shifting.yaml")
    part.add_argument("--seconds", type=seconds, default=90.0, help="judged arrivals of a point")
    part.add_argument("--warmup", type=seconds, default=10.0, help="seconds of arrivals before")
    part.add_argument("--drain", type=seconds, default=15.0, help="seconds after the last arrival")
    part.add_argument("--runs", type=Path, default=Path("goodput_runs"), help="keeps each run")
    part = parts.add_parser("run", parents=[shared], help="serve points")
    part.set_defaults(does=run)
    part.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    part.add_argument("--only", default="", metavar="POINT,...")
    part.add_argument("--model", default="", help="a checkpoint (default: the 8B shape, random)")
    part.add_argument(
        "--cost", default="", help="the table the points were planned with, if it was not shipped"
    )
    part.add_argument("--flags", default="", help="more flags of nitsum serve")
    part = parts.add_parser("table", parents=[shared], help="served beside simulated, and ratios")
    part.set_defaults(does=show_table)
    part.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    part.add_argument("--summary", type=Path, metavar="FILE", help="write a result's summary.json")
    return made


def main() -> None:
    args = parser().parse_args()
    try:
        args.does(args)
    except NitsumError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
