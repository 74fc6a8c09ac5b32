"""`nitsum bench switch`: the added pause of streams, bytes and phases, in a full arena."""

from __future__ import annotations

import argparse
import json

from msgspec import to_builtins

from nitsum.bench.provenance import summary
from nitsum.bench.stages import stages
from nitsum.bench.switch import Result, measure
from nitsum.bench.switch_load import Options
from nitsum.bench.tables import percent, print_line, print_table, size
from nitsum.bench.verify import check_plans
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.readers import check_positive, entries, size_bytes
from nitsum.errors import ConfigError, require_torch
from nitsum.limits import DTYPES
from nitsum.metrics.percentiles import Summary
from nitsum.plan import PlanSet, is_power_of_two, read_plans
from nitsum.shape import ModelShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint folder, a .gguf file, or `demo`")
    add("--ranks", type=int, default=2, metavar="N", help="processes (default: 2)")
    add("--plans", default="", metavar="PLAN,...", help="default: the narrowest and the widest")
    add("--switches", type=int, default=20, metavar="K", help="each way (default: 20)")
    add("--streams", type=int, default=8, metavar="N", help="running at once (default: 8)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="of a stream (default: 32)")
    add("--answer-tokens", type=int, default=160, metavar="N", help="of a stream (default: 160)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu, in float32; cuda "
        "is in bfloat16")  # fmt: skip
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add("--fill", choices=("requests", "cache"), default="requests", help="what fills the arena: "
        "requests, or the prefixes they left behind (default: requests)")  # fmt: skip
    add("--kv-memory", type=size_bytes, metavar="SIZE", help="of a rank; 0: all there is "
        "(default: made for the streams)")  # fmt: skip
    add("--block-tokens", type=int, default=0, metavar="N", help="of a KV block (default: that of "
        "nitsum serve)")  # fmt: skip
    add("--max-batch-tokens", type=int, default=0, metavar="N", help="of a step")
    add("--seed", type=int, default=0, metavar="S", help="of prompts and switches")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Status 1 when a stream's text is not the static layout's."""
    options = _options(args)
    with stages() as progress:
        result = measure(options, progress.stage, progress.note)
    if args.json:
        notes = (
            f"{args.ranks} ranks ({args.device}), {args.streams} streams of {args.prompt_tokens} "
            f"tokens, {options.dtype}; arenas filled by {args.fill}, {_fullness(result)}"
        )
        switches = [to_builtins(report) for report in result.reports]
        found = {"different": result.different, "switches": switches}
        print(json.dumps({**summary(result.figures(), notes), **found}))
    else:
        print_result(result)
    return 0 if result.counts else 1


def _options(args: argparse.Namespace) -> Options:
    require_torch()
    if not is_power_of_two(args.ranks) or args.ranks < 2:
        raise ConfigError(f"--ranks: a power of two from 2 on is expected, not {args.ranks}.")
    check_positive(args, "switches", "streams", "prompt_tokens")
    plans = read_plan_set(args.plans, args.ranks)
    check_plans(plans)
    model = checkpoint_folder(args.model)
    options = Options(
        model=model,
        plans=plans,
        num_each_way=args.switches,
        num_streams=args.streams,
        device=args.device,
        dtype=DTYPES[args.device],
        load_format=args.load_format,
        fill=args.fill,
        kv_bytes=args.kv_memory,
        block_tokens=args.block_tokens,
        max_batch_tokens=args.max_batch_tokens,
        num_prompt=args.prompt_tokens,
        num_answer=args.answer_tokens,
        seed=args.seed,
    )
    longest = ModelShape.from_folder(model).max_positions
    if not 32 <= options.num_answer <= longest - options.num_prompt:
        raise ConfigError(f"--answer-tokens: 32 to {longest - options.num_prompt} are possible.")
    return options


def read_plan_set(text: str, num_ranks: int) -> PlanSet:
    """Plans joined by commas; none are the narrowest and the widest. Raises `ConfigError`."""
    text = text or f"{num_ranks}xTP1,TP{num_ranks}"
    try:
        return read_plans(list(entries(text)), num_ranks)
    except ValueError as error:
        raise ConfigError(f"--plans: {error}, not {text!r}.") from error


def _fullness(result: Result) -> str:
    return f"{percent(min(result.use_at_switch, default=0.0))} used or more when a switch began"


def print_result(result: Result) -> None:
    """Pauses by direction, then what moved, then the text."""
    columns = ("added pause, ms", "switches", "streams", "P50", "P99", "max")
    rows = [
        (f"{d.from_plan} -> {d.to_plan}", str(d.num_switches), *_pause_cells(d.added_pause_s))
        for d in result.directions
    ]
    total = ("all", str(len(result.reports)), *_pause_cells(result.added_pause_s))
    before = ("as long before", "", *_pause_cells(result.pause_before_s))
    print_table("Streams across a switch", columns, [*rows, total, before])
    print_table("A switch, on average", ("", ""), _work_rows(result.figures()))
    _print_steadiness(result.machine.figures())
    print_line(
        f"{result.num_in_full_arena} of {len(result.reports)} switches began in a full arena "
        f"with a prefill in flight; {_fullness(result)}."
    )
    if result.num_streams > result.num_same + result.num_close + len(result.different):
        print_line("Texts were not compared: in bfloat16, layouts round differently.")
        return
    print_line(
        f"Of {result.num_streams} streams, {result.num_same} have the static layout's text, "
        f"{result.num_close} left it at a close call, {len(result.different)} are different."
    )
    for stream in result.different[:10]:
        print_line(f"Different: {stream}")


def _print_steadiness(figures: dict[str, float]) -> None:
    if figures:
        print_line(
            "Of the same piece of work in a process of its own, the machine made "
            f"{figures['machine_p99_over_p50']:.1f} times the usual time at P99, "
            f"{figures['machine_max_over_p50']:.1f} times at most: pauses of that origin are in "
            "the table, with and without a switch."
        )


def _pause_cells(pause: Summary) -> tuple[str, ...]:
    values = (pause.p50, pause.p99, pause.max)
    cells = ("-" if value is None else f"{1e3 * value:.1f}" for value in values)
    return (str(pause.num), *cells)


def _work_rows(figures: dict[str, float]) -> list[tuple[str, str]]:
    return [
        ("duration, ms", f"{figures['switch_ms']:.0f}"),
        ("  propose, ms", f"{figures['propose_ms_per_switch']:.2f}"),
        ("  pre-copy, ms", f"{figures['precopy_ms_per_switch']:.0f}"),
        ("  cut over, ms", f"{figures['cutover_ms_per_switch']:.0f}"),
        ("waves", f"{figures['num_waves_per_switch']:.1f}"),
        ("copied", size(figures["moved_bytes_per_switch"])),
        ("units that stayed in place", f"{figures['units_in_place_per_switch']:.0f}"),
        ("requests that finished in their old lane, in all", f"{figures['num_left_behind']:.0f}"),
    ]
