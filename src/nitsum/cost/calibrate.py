"""Fit a device's `Rates` to measured kernels, and say how well they fit.

    python -m nitsum.cost.calibrate --gpu A100-80GB --ops OPS.csv... --all-reduce AR.csv

GEMM, elementwise and all-reduce rates are fitted. What these tables do not hold (attention, price
of a step, KV moves) is kept from the device's present file, or from `--base` for a new device.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from nitsum.cost.curve import Curve, fit_curve
from nitsum.cost.profiles import (
    AllReducePoint,
    ElementwisePoint,
    GemmPoint,
    read_all_reduces,
    read_elementwise,
    read_gemms,
)
from nitsum.cost.rates import GemmRate, LinearRate, Rates, load_rates
from nitsum.cost.simplex import Point, minimise
from nitsum.errors import ConfigError, NitsumError

_DTYPE_BYTES = 2
_KNOTS = tuple(float(1 << bit) for bit in range(13, 27))
"""All-reduce sizes kept as knots: 8 KiB to 64 MiB."""
TOKEN_RANGES = ((1, 16), (17, 64), (65, 256), (257, 1024), (1025, 8192), (8193, 1 << 20))

P = TypeVar("P", GemmPoint, ElementwisePoint, AllReducePoint)


class FitError(NamedTuple):
    """Relative errors of a group of points."""

    group: str
    num_points: int
    median: float
    p90: float


# --- fitting --------------------------------------------------------------------------------------


def fit_gemm(points: Sequence[GemmPoint], start: GemmRate) -> GemmRate:
    """The rate that minimises the mean absolute log error, each octave of rows weighing alike."""
    sample = _thin(points, lambda p: p.rows)

    def rate(logs: Point) -> GemmRate:
        return GemmRate(*(math.exp(x) for x in logs))

    def loss(logs: Point) -> float:
        gemm = rate(logs)
        return sum(
            weight
            * abs(math.log(gemm.seconds(p.rows, p.outputs, p.inputs, _DTYPE_BYTES) / p.seconds))
            for p, weight in sample
        )

    return rate(minimise(loss, _logs(start), step=0.3, num_rounds=300))


def fit_linear(points: Iterable[tuple[int, float]], start: LinearRate) -> LinearRate:
    """Launch and bandwidth from (bytes, seconds), by mean absolute log error."""
    sample = _thin(list(points), lambda p: p[0])

    def loss(logs: Point) -> float:
        launch, rate = math.exp(logs[0]), math.exp(logs[1])
        return sum(w * abs(math.log((launch + b / rate) / s)) for (b, s), w in sample)

    logs = (math.log(start.launch_s), math.log(start.bytes_per_s))
    best = minimise(loss, logs, step=0.3, num_rounds=200)
    return LinearRate(math.exp(best[0]), math.exp(best[1]))


def _logs(rate: GemmRate) -> Point:
    return tuple(math.log(x) for x in msgspec.structs.astuple(rate))


_MAX_PER_OCTAVE = 250
X = TypeVar("X", bound=tuple[float, ...])


def _thin(points: Sequence[X], size: Callable[[X], float]) -> list[tuple[X, float]]:
    """At most a few hundred points per octave of size, weighted so that octaves balance."""
    buckets: dict[int, list[X]] = defaultdict(list)
    for point in sorted(points):
        buckets[int(size(point)).bit_length()].append(point)
    thinned: list[tuple[X, float]] = []
    for bucket in buckets.values():
        picked = bucket[:: -(-len(bucket) // _MAX_PER_OCTAVE)]
        thinned.extend((point, 1.0 / len(picked)) for point in picked)
    return thinned


# --- errors ---------------------------------------------------------------------------------------


def gemm_errors(points: Iterable[GemmPoint], gemm: GemmRate) -> list[FitError]:
    """Errors by degree and range of rows."""

    def predicted(p: GemmPoint) -> float:
        return gemm.seconds(p.rows, p.outputs, p.inputs, _DTYPE_BYTES)

    groups = _grouped(points, predicted, lambda p: (p.degree, _token_range(p.rows)))
    return [
        _fit_error(f"TP{degree} {low}-{high} tokens", errors)
        for (degree, (low, high)), errors in sorted(groups.items())
    ]


def layer_errors(points: Iterable[GemmPoint], gemm: GemmRate) -> list[FitError]:
    """Errors of the GEMMs of a whole layer, by degree: what a step feels."""
    layers: dict[tuple[int, int, int], list[GemmPoint]] = defaultdict(list)
    for point in points:
        layers[(point.degree, point.hidden, point.rows)].append(point)
    by_degree: dict[int, list[float]] = defaultdict(list)
    for (degree, _, _), layer in layers.items():
        predicted = sum(gemm.seconds(p.rows, p.outputs, p.inputs, _DTYPE_BYTES) for p in layer)
        by_degree[degree].append(abs(predicted / sum(p.seconds for p in layer) - 1.0))
    return [_fit_error(f"TP{d} layer", errors) for d, errors in sorted(by_degree.items())]


def all_reduce_errors(points: Iterable[AllReducePoint], rates: dict[int, Curve]) -> list[FitError]:
    """Errors by number of ranks, below and above 1 MiB."""
    known = [p for p in points if p.ranks in rates]
    groups = _grouped(
        known,
        lambda p: rates[p.ranks].seconds(p.num_bytes),
        lambda p: (p.ranks, "over" if p.num_bytes >= 1 << 20 else "below"),
    )
    return [
        _fit_error(f"{ranks} ranks, {side} 1 MiB", errors)
        for (ranks, side), errors in sorted(groups.items())
    ]


def elementwise_error(points: Iterable[ElementwisePoint], rate: LinearRate) -> FitError:
    errors = [abs(rate.seconds(p.num_bytes) / p.seconds - 1.0) for p in points]
    return _fit_error("elementwise", errors)


K = TypeVar("K")


def _grouped(
    points: Iterable[P], predicted: Callable[[P], float], group: Callable[[P], K]
) -> dict[K, list[float]]:
    groups: dict[K, list[float]] = defaultdict(list)
    for point in points:
        groups[group(point)].append(abs(predicted(point) / point.seconds - 1.0))
    return groups


def _token_range(rows: int) -> tuple[int, int]:
    return next(bounds for bounds in TOKEN_RANGES if rows <= bounds[1])


def _fit_error(group: str, errors: list[float]) -> FitError:
    p90 = statistics.quantiles(errors, n=10, method="inclusive")[-1] if len(errors) > 1 else 0.0
    return FitError(group, len(errors), statistics.median(errors), p90 or errors[0])


# --- the command ----------------------------------------------------------------------------------


def calibrate(
    base: Rates, ops: Sequence[Path], all_reduce: Sequence[Path], sources: list[str]
) -> tuple[Rates, list[FitError]]:
    """`base` with fitted constants, and the errors of the fit."""
    gemms = [point for path in ops for point in read_gemms(path)]
    elementwise = [point for path in ops for point in read_elementwise(path)]
    reduces = [point for path in all_reduce for point in read_all_reduces(path)]
    rates = msgspec.structs.replace(
        base,
        source=sources or base.source,
        gemm=fit_gemm(gemms, base.gemm) if gemms else base.gemm,
        elementwise=_fit_elementwise(elementwise, base.elementwise),
        all_reduce={**base.all_reduce, **_fit_all_reduces(reduces)},
    )
    errors = gemm_errors(gemms, rates.gemm) + layer_errors(gemms, rates.gemm)
    errors += all_reduce_errors(reduces, rates.all_reduce)
    if elementwise:
        errors.append(elementwise_error(elementwise, rates.elementwise))
    return rates, errors


def _fit_elementwise(points: list[ElementwisePoint], base: LinearRate) -> LinearRate:
    return fit_linear(((p.num_bytes, p.seconds) for p in points), base) if points else base


def _fit_all_reduces(points: list[AllReducePoint]) -> dict[int, Curve]:
    by_ranks: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        by_ranks[point.ranks].append((point.num_bytes, point.seconds))
    return {ranks: fit_curve(pairs, _KNOTS) for ranks, pairs in sorted(by_ranks.items())}


def _print_errors(errors: list[FitError]) -> None:
    print(f"{'group':<28}{'points':>8}{'median':>9}{'P90':>9}")
    for error in errors:
        print(f"{error.group:<28}{error.num_points:>8}{error.median:>9.1%}{error.p90:>9.1%}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nitsum.cost.calibrate", description=__doc__)
    parser.add_argument("--gpu", default="A100-80GB", help="device the tables were measured on")
    parser.add_argument("--base", help="device whose constants fill what the tables lack")
    parser.add_argument("--ops", nargs="+", type=Path, default=[], help="CSV of op times")
    parser.add_argument("--all-reduce", nargs="+", type=Path, default=[], help="CSV of all-reduces")
    parser.add_argument("--source", action="append", default=[], help="recorded with the constants")
    parser.add_argument("--out", type=Path, help="write the constants here, JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        if not args.ops and not args.all_reduce:
            raise ConfigError("Nothing to fit: give --ops, --all-reduce or both.")
        base = msgspec.structs.replace(load_rates(args.base or args.gpu), gpu=args.gpu)
        rates, errors = calibrate(base, args.ops, args.all_reduce, args.source)
    except NitsumError as error:
        print(error, file=sys.stderr)
        return 2
    _print_errors(errors)
    text = msgspec.json.format(msgspec.json.encode(rates), indent=2)
    if args.out:
        args.out.write_bytes(text + b"\n")
    else:
        print(text.decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
