"""`nitsum bench engine --device cuda`: decode, prefill and saturation beside floors."""

from __future__ import annotations

import argparse
import json

from nitsum.bench.cuda_engine import Options, Result, measure
from nitsum.bench.provenance import summary
from nitsum.bench.stages import stages
from nitsum.bench.tables import print_line, print_table
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.machine import inspect_machine
from nitsum.errors import ConfigError


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Flags that only GPUs have; `--batches` and `--json` are shared."""
    add = parser.add_argument
    add("--tp", type=int, default=1, metavar="T", help="GPUs of the lane (default: 1)")
    add("--context", type=int, default=1024, metavar="N",
        help="mean context of decode figures (default: 1024)")  # fmt: skip
    add("--load-format", choices=("auto", "dummy"), default="dummy", help="default: dummy weights")
    add("--saturation", type=int, default=0, metavar="N",
        help="also N requests of 1,155 tokens in and 211 out at once")  # fmt: skip


def run(args: argparse.Namespace, batches: tuple[int, ...] | None = None) -> int:
    """Measure and print; `batches` None takes 1, 8, 32, 64, 128 and 256."""
    gpus = inspect_machine().gpus
    if len(gpus) < args.tp:
        raise ConfigError(f"--tp {args.tp}: nvidia-smi shows {len(gpus)} GPU(s).")
    options = Options(
        model=checkpoint_folder(args.model),
        tp=args.tp,
        saturation=args.saturation,
        context=args.context,
        load_format=args.load_format,
        batches=batches or Options.batches,
    )
    with stages() as progress:
        result = measure(options, progress.stage, progress.note)
    if args.json:
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        notes = f"{args.tp} x {names}, bfloat16, {args.load_format} weights"
        print(json.dumps(summary(result.figures, notes)))
    else:
        print_result(result, options)
    return 0


def print_result(result: Result, options: Options) -> None:
    """Ours beside the floor."""
    found, tp = result.figures, options.tp
    columns = ("", "ms", "floor, ms", "over floor")
    rows = [(f"decode, batch {b}", *_row(found, "decode", f"tp{tp}_b{b}")) for b in options.batches]
    rows += [(f"prompt of {n:,}", *_row(found, "prefill", f"tp{tp}_{n}")) for n in options.prompts]
    print_table(f"TP {tp}", columns, rows)
    if options.saturation:
        rate = found[f"saturation_output_tokens_per_s_tp{tp}"]
        print_line(f"{options.saturation} requests at once: {rate:,.0f} output tokens/s")
    print_line(
        f"Copies: {found['copy_tb_per_s']:.2f} TB/s, read and written. Products: "
        f"{found['matrix_tflop_per_s']:.0f} TFLOP/s."
    )


def _row(figures: dict[str, float], what: str, name: str) -> tuple[str, str, str]:
    return (
        f"{figures[f'{what}_ms_{name}']:.2f}",
        f"{figures[f'{what}_floor_ms_{name}']:.2f}",
        f"{figures[f'{what}_over_floor_{name}']:.2f}",
    )
