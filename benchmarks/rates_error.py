"""How far the constants of the analytic cost model lie from the kernels they were fitted to.

    python -m benchmarks.rates_error --ops OPS.csv... --all-reduce AR.csv [--out FOLDER]

The constants that come with Nitsum for the GPU of `--machine`, on the tables that `python -m
nitsum.cost.calibrate` fits: relative errors without their sign, median and P90, of points that the
fit has seen. Beside them what share of a step of `--model` each term is, which says what rests on
terms that no table measures (attention, the price of a step).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nitsum.bench.provenance import summary
from nitsum.cost.analytic import AnalyticCost, StepParts
from nitsum.cost.calibrate import (
    FitError,
    all_reduce_errors,
    elementwise_error,
    gemm_errors,
    layer_errors,
)
from nitsum.cost.machines import Machine
from nitsum.cost.profiles import read_all_reduces, read_elementwise, read_gemms
from nitsum.cost.rates import Rates, load_rates
from nitsum.cost.shapes import shape_named
from nitsum.step import BatchShape

CONTEXT = 1024
STEPS = {
    "decode_b16": BatchShape(num_decode=16, decode_context_tokens=16 * CONTEXT, num_samples=16),
    "decode_b128": BatchShape(num_decode=128, decode_context_tokens=128 * CONTEXT, num_samples=128),
    "prefill_2048": BatchShape(
        prefill_tokens=2048, prefill_context_tokens=2048 * 2049 // 2, num_samples=1
    ),
}


def errors_of(rates: Rates, ops: Sequence[Path], all_reduce: Sequence[Path]) -> list[FitError]:
    """By group of points; raises `ConfigError` for a table that cannot be read."""
    gemms = [point for path in ops for point in read_gemms(path)]
    elementwise = [point for path in ops for point in read_elementwise(path)]
    reduces = [point for path in all_reduce for point in read_all_reduces(path)]
    found = gemm_errors(gemms, rates.gemm) + layer_errors(gemms, rates.gemm)
    found += all_reduce_errors(reduces, rates.all_reduce)
    return [*found, elementwise_error(elementwise, rates.elementwise)] if elementwise else found


def figures(errors: Iterable[FitError]) -> Iterator[tuple[str, float]]:
    for error in errors:
        name = "_".join("".join(c if c.isalnum() else " " for c in error.group).split()).lower()
        yield f"{name}_num_points", float(error.num_points)
        yield f"{name}_error_p50_share", error.median
        yield f"{name}_error_p90_share", error.p90


def shares(cost: AnalyticCost, degree: int) -> Iterator[tuple[str, float]]:
    """Of a step's time, by term."""
    for step, shape in STEPS.items():
        parts = cost.parts(degree, shape)
        for term, seconds in zip(StepParts._fields, parts, strict=True):
            yield f"{step}_{term.removesuffix('_s')}_share", seconds / parts.total_s


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    machine = Machine.parse(args.machine)
    errors = errors_of(load_rates(machine.gpu.rates), args.ops, args.all_reduce)
    cost = AnalyticCost(shape_named(args.model), machine)
    found = dict(figures(errors)) | dict(shares(cost, machine.num_gpus))
    for name, value in found.items():
        print(f"{name:<48}{value:>12,.3f}")
    if args.out is not None:
        notes = (
            f"Constants of {machine.gpu.rates} as they come with Nitsum, on the tables they were "
            f"fitted to. Shares: {args.model} at TP{machine.num_gpus} on {args.machine}, contexts "
            f"of {CONTEXT} in decodes. Sources: {'; '.join(load_rates(machine.gpu.rates).source)}."
        )
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_result(found, notes, args), indent=1)
        (args.out / "summary.json").write_text(text + "\n", encoding="utf-8")


def _result(found: dict[str, float], notes: str, args: argparse.Namespace) -> dict[str, object]:
    command = (
        f"python -m benchmarks.rates_error --model {args.model} --machine {args.machine} "
        f"--ops {' '.join(path.name for path in args.ops)} "
        f"--all-reduce {' '.join(path.name for path in args.all_reduce)}"
    )
    return {**summary(found, notes), "command": command}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates_error", description=__doc__)
    parser.add_argument("--model", default="Llama-3.1-70B")
    parser.add_argument("--machine", default="8xA100-80GB", help="its GPU has the constants")
    parser.add_argument("--ops", nargs="+", type=Path, default=[], help="CSV of op times")
    parser.add_argument("--all-reduce", nargs="+", type=Path, default=[], help="CSV of all-reduces")
    parser.add_argument("--out", type=Path, help="folder of a result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
