"""`nitsum bench overlay`: what it costs lanes to take turns on the same GPUs."""

from __future__ import annotations

import argparse
import json

from nitsum.bench.overlay import PLAN, Options, measure
from nitsum.bench.provenance import summary
from nitsum.bench.stages import stages
from nitsum.bench.tables import print_table
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.machine import inspect_machine
from nitsum.cli.readers import check_positive
from nitsum.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder")
    add("--turns", type=int, default=1000, metavar="N", help="default: 1000")
    add("--sequences", type=int, default=8, metavar="N", help="of each lane (default: 8)")
    add("--load-format", choices=("auto", "dummy"), default="dummy", help="default: dummy weights")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    gpus = inspect_machine().gpus
    if len(gpus) < 2:
        raise ConfigError(f"Two GPUs are needed for {PLAN}; nvidia-smi shows {len(gpus)}.")
    check_positive(args, "turns", "sequences")
    options = Options(checkpoint_folder(args.model), args.turns, args.sequences, args.load_format)
    with stages() as progress:
        figures = measure(options, progress.stage, progress.note)
    if args.json:
        notes = f"{PLAN} on 2 x {gpus[0].name}, {args.sequences} sequences a lane, bfloat16"
        print(json.dumps(summary(figures, notes)))
    else:
        rows = [(name, f"{value:,.1f}") for name, value in figures.items()]
        print_table("Lanes taking turns", ("", ""), rows)
    return 0
