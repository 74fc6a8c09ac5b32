"""`nitsum bench engine`: decode speed, beside transformers and the memory's floor."""

from __future__ import annotations

import argparse
import json

from nitsum.bench.engine import Batch, Options, Result, measure, rate, spread
from nitsum.bench.provenance import num_cores, summary
from nitsum.bench.reference import require_transformers
from nitsum.bench.stages import stages
from nitsum.bench.tables import percent, print_line, print_table
from nitsum.cli import bench_cuda
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.readers import check_positive
from nitsum.errors import ConfigError

DEFAULT_BATCHES = "1,8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder, a .gguf file, or `demo`")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    add("--batches", default=DEFAULT_BATCHES, metavar="N,...",
        help="sequences at once (default: 1,8; on GPUs up to 256)")  # fmt: skip
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of either side")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="default: 32")
    add("--answer-tokens", type=int, default=64, metavar="N", help="default: 64")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each side (default: 5)")
    add("--json", action="store_true", help="print one JSON object")
    bench_cuda.add_arguments(parser.add_argument_group("on GPUs"))


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        batches = None if args.batches == DEFAULT_BATCHES else _batches(args.batches)
        return bench_cuda.run(args, batches)
    options = _options(args)
    with stages() as progress:
        result = measure(options, progress.stage, progress.note)
    if args.json:
        notes = f"{options.num_threads} threads, float32, warm-up round left out"
        print(json.dumps(summary(result.figures(), notes)))
    else:
        print_result(result, options)
    return 0


def _options(args: argparse.Namespace) -> Options:
    check_positive(args, "rounds", "prompt_tokens")
    if args.answer_tokens < 8:
        raise ConfigError("--answer-tokens must be at least 8: a rate needs several steps.")
    require_transformers()
    return Options(
        model=checkpoint_folder(args.model),
        batches=_batches(args.batches),
        num_threads=args.threads or num_cores(),
        num_prompt=args.prompt_tokens,
        num_answer=args.answer_tokens,
        num_rounds=args.rounds,
    )


def _batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--batches: numbers from 1 on, joined by commas, not {text!r}.")
    return sizes


def print_result(result: Result, options: Options) -> None:
    """Floor, ours, theirs, batch by batch."""
    columns = ("", "step, ms", "tokens/s", "spread", "first token, ms")
    for batch in result.batches:
        print_table(f"Batch {batch.size}", columns, _rows(batch))
        print_line(f"Ours over transformers: {batch.vs_transformers:.2f} (above 1 is faster)\n")
    print_line(
        f"Memory: {result.bandwidth / 1e9:.1f} GB/s on {options.num_threads} threads. "
        f"A step reads {result.weight_bytes / 1e6:.0f} MB of weights."
    )


def _rows(batch: Batch) -> list[tuple[str, ...]]:
    figures = batch.figures()
    floor_ms = batch.floor_ms
    sides = (
        ("nitsum", batch.ours, "ttft_ms"),
        ("transformers", batch.theirs, "transformers_ttft_ms"),
    )
    return [
        (
            "floor: weights and KV read once",
            f"{floor_ms:.1f}",
            f"{1e3 * batch.size / floor_ms:.1f}",
        ),
        *(
            (
                name,
                f"{batch.decode_ms(timings):.1f}",
                f"{rate(timings):.1f}",
                percent(spread(timings)),
                f"{figures[f'{first}_b{batch.size}']:.0f}",
            )
            for name, timings, first in sides
        ),
        ("nitsum, inside the worker", f"{batch.worker_ms:.1f}"),
    ]
