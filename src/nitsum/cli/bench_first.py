"""`nitsum bench first`: what the first request of a class takes, over the median of later ones."""

from __future__ import annotations

import argparse
import json
from statistics import median

from nitsum.bench.first import NUM_ANSWER, Options, Result, measure
from nitsum.bench.provenance import summary
from nitsum.bench.stages import stages
from nitsum.bench.tables import print_line, print_table
from nitsum.bench.verify import check_plans
from nitsum.cli.bench_switch import read_plan_set
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.readers import check_positive
from nitsum.errors import ConfigError, require_torch
from nitsum.limits import DTYPES
from nitsum.shape import ModelShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder, a .gguf file, or `demo`")
    add("--ranks", type=int, default=2, metavar="N", help="processes or GPUs (default: 2)")
    add("--plans", default="", metavar="PLAN,...", help="default: the narrowest and the widest")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu, in float32; cuda "
        "is in bfloat16")  # fmt: skip
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add("--prompt-tokens", type=int, default=256, metavar="N", help="default: 256")
    add("--rounds", type=int, default=20, metavar="N", help="after the first one (default: 20)")
    add("--starts", type=int, default=3, metavar="N", help="of the workers (default: 3)")
    add("--seed", type=int, default=0, metavar="S", help="of prompts")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    options = _options(args)
    with stages() as progress:
        result = measure(options, progress.stage, progress.note)
    if args.json:
        notes = (
            f"{args.ranks} ranks ({args.device}), {options.dtype}; lone requests of "
            f"{options.num_prompt} tokens, {options.num_rounds} of each class after its first, "
            f"{options.num_starts} starts; a class is a tier in a plan"
        )
        print(json.dumps(summary(result.figures(), notes)))
    else:
        print_result(result)
    return 0


def _options(args: argparse.Namespace) -> Options:
    require_torch()
    check_positive(args, "rounds", "starts", "prompt_tokens")
    plans = read_plan_set(args.plans, args.ranks)
    check_plans(plans)
    model = checkpoint_folder(args.model)
    options = Options(
        model=model,
        plans=plans,
        device=args.device,
        dtype=DTYPES[args.device],
        load_format=args.load_format,
        num_prompt=args.prompt_tokens,
        num_rounds=args.rounds,
        num_starts=args.starts,
        seed=args.seed,
    )
    longest = ModelShape.from_folder(model).max_positions - NUM_ANSWER
    if options.num_prompt > longest:
        raise ConfigError(f"--prompt-tokens: up to {longest} are possible.")
    return options


def print_result(result: Result) -> None:
    """Class by class, in the order of their first requests."""
    columns = ("plan, tier", "first, ms", "later: P50", "first over P50", "P90 over P50")
    rows = [
        (
            f"{each.plan}, {each.tier}",
            f"{1e3 * median(each.first_s):.1f}",
            f"{1e3 * each.median_s:.1f}",
            f"{each.ratio:.2f}",
            f"{each.noise:.2f}",
        )
        for each in result.classes
    ]
    print_table("First token of lone requests", columns, rows)
    print_line(f"The worst first request takes {result.worst.ratio:.2f} times the median.")
