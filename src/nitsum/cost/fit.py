"""From measured steps to a `CostTable`.

Points of the same batch at different contexts give the price of context (non-negative least
squares on differences inside a cell of the grid); what that leaves over, averaged per cell and made
isotonic, is the grid. Weights are 1 / seconds^2, so that relative errors count.

    python -m nitsum.cost.fit POINTS.jsonl --model NAME --hardware TEXT --out TABLE.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path

import msgspec

from nitsum.cost.curve import isotonic
from nitsum.cost.protocol import CostModel
from nitsum.cost.rates import LinearRate
from nitsum.cost.table import (
    CostTable,
    DegreeTable,
    Provenance,
    TableCost,
    save_table,
)
from nitsum.errors import ConfigError, NitsumError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

_NUM_SWEEPS = 100
_MAX_KNOTS = 8
_MAX_AXIS = 64

Grid = list[list[float]]


class StepPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One measured step (or the median of several alike)."""

    degree: int
    num_decode: int
    decode_context_tokens: int
    prefill_tokens: int
    prefill_context_tokens: int
    seconds: float

    @property
    def batch(self) -> BatchShape:
        return BatchShape(
            self.num_decode,
            self.decode_context_tokens,
            self.prefill_tokens,
            self.prefill_context_tokens,
            self.num_decode + (self.prefill_tokens > 0),
        )


def fit_degree(points: Sequence[StepPoint]) -> DegreeTable:
    """The table of one degree; raises `ConfigError` when the points are no grid."""
    fit = _Fit(points)
    if max(len(fit.decode_axis), len(fit.prefill_axis)) > _MAX_AXIS:
        raise ConfigError(
            f"More than {_MAX_AXIS} batch sizes or chunk sizes were measured: measure on a grid."
        )
    return fit.run()


class _Fit:
    """The state of one fit: the points, their cell of the grid, their context by segment."""

    def __init__(self, points: Sequence[StepPoint]) -> None:
        self.points = points
        self.decode_axis = _axis(p.num_decode for p in points)
        self.prefill_axis = _axis(p.prefill_tokens for p in points)
        self.knots = _knots([p.decode_context_tokens for p in points])
        self.weights = [1.0 / p.seconds**2 for p in points]
        self.cells = [self._cell(p) for p in points]
        self.features = [self._features(p) for p in points]

    def run(self) -> DegreeTable:
        prices = self._prices()
        return self._with_errors(self._table(prices, self._grid(prices)))

    def _cell(self, point: StepPoint) -> tuple[int, int]:
        return (
            self.decode_axis.index(point.num_decode),
            self.prefill_axis.index(point.prefill_tokens),
        )

    def _features(self, point: StepPoint) -> list[float]:
        """Tokens of context in each segment between knots, then the prefill context."""
        context = point.decode_context_tokens
        segments = [min(max(context - low, 0), high - low) for low, high in pairwise(self.knots)]
        return [*map(float, segments), float(point.prefill_context_tokens)]

    def _prices(self) -> list[float]:
        """Seconds per unit of each feature, from differences between points of the same cell."""
        columns = [self._centred(list(column)) for column in zip(*self.features, strict=True)]
        seconds = self._centred([p.seconds for p in self.points])
        if self.knots[1:] and not any(any(column) for column in columns[:-1]):
            raise ConfigError(
                f"TP{self.points[0].degree}: every decode batch was measured at one context only. "
                "Measure at least two contexts for some batch."
            )
        return non_negative_least_squares(columns, seconds, self.weights)

    def _centred(self, values: list[float]) -> list[float]:
        """Values less the weighted mean of their cell."""
        sums = self._cell_sums(values)
        means = {cell: total / weight for cell, (total, weight) in sums.items()}
        return [value - means[cell] for value, cell in zip(values, self.cells, strict=True)]

    def _cell_sums(self, values: list[float]) -> dict[tuple[int, int], tuple[float, float]]:
        sums: dict[tuple[int, int], tuple[float, float]] = {}
        for value, cell, w in zip(values, self.cells, self.weights, strict=True):
            total, weight = sums.get(cell, (0.0, 0.0))
            sums[cell] = (total + w * value, weight + w)
        return sums

    def _grid(self, prices: list[float]) -> Grid:
        rest = [
            point.seconds - sum(price * x for price, x in zip(prices, features, strict=True))
            for point, features in zip(self.points, self.features, strict=True)
        ]
        return isotonic_grid(len(self.decode_axis), len(self.prefill_axis), self._cell_sums(rest))

    def _table(self, prices: list[float], grid: Grid) -> DegreeTable:
        context_s = [0.0]
        for price, (low, high) in zip(prices[:-1], pairwise(self.knots), strict=True):
            context_s.append(context_s[-1] + price * (high - low))
        return DegreeTable(
            degree=self.points[0].degree,
            decode_axis=self.decode_axis,
            prefill_axis=self.prefill_axis,
            dense_s=grid,
            context_axis=self.knots,
            context_s=context_s,
            prefill_context_s=prices[-1],
        )

    def _with_errors(self, entry: DegreeTable) -> DegreeTable:
        errors = relative_errors(TableCost(_bare_table([entry])), self.points)
        return msgspec.structs.replace(
            entry, median_error=statistics.median(errors), p90_error=p90(errors)
        )


def non_negative_least_squares(
    columns: list[list[float]], target: list[float], weights: list[float]
) -> list[float]:
    """Prices >= 0 that bring the weighted sum of columns near the target: coordinate descent."""
    prices = [0.0] * len(columns)
    norms = [sum(w * c * c for w, c in zip(weights, column, strict=True)) for column in columns]
    residual = list(target)
    for _ in range(_NUM_SWEEPS):
        for k, column in enumerate(columns):
            if norms[k] == 0.0:
                continue
            pull = sum(w * c * r for w, c, r in zip(weights, column, residual, strict=True))
            change = max(-prices[k], pull / norms[k])
            prices[k] += change
            residual = [r - change * c for r, c in zip(residual, column, strict=True)]
    return prices


def p90(values: list[float]) -> float:
    """Of at least one value."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if values[1:] else values[0]


def relative_errors(cost: CostModel, points: Sequence[StepPoint]) -> list[float]:
    """|predicted / measured - 1| of each point."""
    return [abs(cost.step_time(_lane(p.degree), p.batch) / p.seconds - 1.0) for p in points]


def isotonic_grid(
    num_rows: int, num_columns: int, sums: dict[tuple[int, int], tuple[float, float]]
) -> Grid:
    """A grid that falls in neither direction, near the weighted means of `sums`.

    `sums` holds (weighted sum, weight) of the cells that were measured; the rest is filled from
    its neighbours. Rows and columns are made isotonic in turns, which converges quickly; a last
    running maximum removes what is left.
    """
    grid = _filled(num_rows, num_columns, sums)
    weights = [
        [sums.get((i, j), (0.0, 1e-9))[1] for j in range(num_columns)] for i in range(num_rows)
    ]
    for _ in range(8):
        grid = [isotonic(row, w) for row, w in zip(grid, weights, strict=True)]
        columns = zip(_transposed(grid), _transposed(weights), strict=True)
        grid = _transposed([isotonic(column, w) for column, w in columns])
    return running_maximum(grid)


def _filled(
    num_rows: int, num_columns: int, sums: dict[tuple[int, int], tuple[float, float]]
) -> Grid:
    """Means where measured; elsewhere the largest measured cell that is no further in any count."""
    means = {cell: total / weight for cell, (total, weight) in sums.items()}
    least = min(means.values())

    def value(i: int, j: int) -> float:
        if (i, j) in means:
            return means[(i, j)]
        return max((s for (a, b), s in means.items() if a <= i and b <= j), default=least)

    return [[value(i, j) for j in range(num_columns)] for i in range(num_rows)]


def _transposed(grid: Grid) -> Grid:
    return [list(column) for column in zip(*grid, strict=True)]


def running_maximum(grid: Grid) -> Grid:
    """Each cell at least as large as those before it in its row and column, and as 0."""
    result = [[max(0.0, value) for value in row] for row in grid]
    for i, row in enumerate(result):
        for j in range(len(row)):
            above = result[i - 1][j] if i else 0.0
            left = row[j - 1] if j else 0.0
            row[j] = max(row[j], above, left)
    return result


def _axis(values: Iterable[int]) -> list[int]:
    return sorted(set(values))


def _knots(contexts: list[int]) -> list[int]:
    """0 and up to eight evenly picked contexts, the largest among them."""
    distinct = sorted(set(contexts) - {0})
    step = max(1, -(-len(distinct) // _MAX_KNOTS))
    return [0, *reversed(distinct[::-1][::step])]


def _lane(degree: int) -> Lane:
    return Lane(Group(degree, 0))


def _bare_table(degrees: list[DegreeTable]) -> CostTable:
    """A table around degrees that are still being fitted."""
    nothing = Provenance(kind="measured", hardware="", versions={}, date="", command="")
    rate = LinearRate(0.0, 1e9)
    return CostTable(model="", provenance=nothing, degrees=degrees, move=rate, offload=rate)


# --- whole tables ---------------------------------------------------------------------------------


def fit_table(
    points: Sequence[StepPoint],
    *,
    model: str,
    provenance: Provenance,
    move: LinearRate,
    offload: LinearRate,
) -> CostTable:
    """Fit every degree that was measured; raises `ConfigError` when nothing was."""
    if not points:
        raise ConfigError("No measured steps to fit.")
    by_degree: dict[int, list[StepPoint]] = {}
    for point in points:
        by_degree.setdefault(point.degree, []).append(point)
    degrees = [fit_degree(by_degree[degree]) for degree in sorted(by_degree)]
    return CostTable(
        model=model, provenance=provenance, degrees=degrees, move=move, offload=offload
    )


def sample_points(
    cost: CostModel,
    degrees: Sequence[int],
    *,
    num_decodes: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
    chunks: Sequence[int] = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    contexts: Sequence[int] = (128, 1024, 4096),
) -> list[StepPoint]:
    """The steps of a grid as `cost` predicts them: an analytic table, or a test of the fit."""
    return [
        StepPoint(
            degree=degree,
            num_decode=num_decode,
            decode_context_tokens=num_decode * context,
            prefill_tokens=chunk,
            prefill_context_tokens=chunk * before + chunk * (chunk + 1) // 2,
            seconds=cost.step_time(
                _lane(degree),
                BatchShape(
                    num_decode,
                    num_decode * context,
                    chunk,
                    chunk * before + chunk * (chunk + 1) // 2,
                    num_decode + (chunk > 0),
                ),
            ),
        )
        for degree in degrees
        for num_decode in num_decodes
        for chunk in chunks
        for context in (contexts if num_decode else contexts[:1])
        for before in ((0, 4096) if chunk else (0,))
        if num_decode or chunk
    ]


def read_points(path: Path) -> list[StepPoint]:
    """One JSON object a line, fields as in `StepPoint`; raises `ConfigError` with the line."""
    decoder = msgspec.json.Decoder(StepPoint)
    points: list[StepPoint] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                points.append(_decoded(decoder, line, f"{path}, line {number}"))
    return points


def _decoded(decoder: msgspec.json.Decoder[StepPoint], line: bytes, where: str) -> StepPoint:
    try:
        point = decoder.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}.") from error
    if point.seconds <= 0.0:
        raise ConfigError(f"{where}: seconds must be positive.")
    return point


def print_fit(table: CostTable) -> None:
    """The error of the fit by degree."""
    print(f"{'degree':<8}{'median':>9}{'P90':>9}")
    for entry in table.degrees:
        print(f"TP{entry.degree:<6}{entry.median_error:>9.1%}{entry.p90_error:>9.1%}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nitsum.cost.fit", description=__doc__)
    parser.add_argument("points", type=Path, help="measured steps, JSON lines")
    parser.add_argument("--model", required=True)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", action="append", default=[], help="NAME=VERSION, repeatable")
    parser.add_argument("--move-gb-per-s", type=float, default=300.0)
    parser.add_argument("--offload-gb-per-s", type=float, default=25.0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    provenance = Provenance(
        kind="measured",
        hardware=args.hardware,
        versions=dict(item.partition("=")[::2] for item in args.version),
        date=date.today().isoformat(),
        command="python -m nitsum.cost.fit " + " ".join(argv or sys.argv[1:]),
    )
    try:
        table = fit_table(
            read_points(args.points),
            model=args.model,
            provenance=provenance,
            move=LinearRate(50e-6, args.move_gb_per_s * 1e9),
            offload=LinearRate(50e-6, args.offload_gb_per_s * 1e9),
        )
    except (NitsumError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    save_table(table, args.out)
    print_fit(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
