"""Measured steps as a table, and the cost model that interpolates in it.

A step is the sum of three measured parts, each monotone:

    dense(num_decode, prefill_tokens)    bilinear: GEMMs, all-reduces, launches, sampling
    context(decode_context_tokens)       piecewise linear: reading KV in decode
    prefill_context_s * prefill_context  linear: attention in prefill

Sums keep the table small: contexts need not be measured for every batch. What the sum misses is
printed as the fit error (`fit.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Literal

import msgspec

from nitsum.cost.curve import interpolate
from nitsum.cost.rates import LinearRate
from nitsum.errors import ConfigError
from nitsum.plan import Lane
from nitsum.step import BatchShape


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where the numbers come from: enough to measure them again."""

    kind: Literal["measured", "analytic"]
    hardware: str
    versions: dict[str, str]
    date: str
    command: str
    notes: str = ""


class DegreeTable(msgspec.Struct, frozen=True, kw_only=True):
    """Step times at one degree, seconds."""

    degree: int
    decode_axis: list[int]
    """Numbers of decoding sequences, ascending."""
    prefill_axis: list[int]
    """Numbers of prefill tokens, ascending."""
    dense_s: list[list[float]]
    """[decode][prefill]."""
    context_axis: list[int]
    """Total context of the decoding sequences, tokens, ascending from 0."""
    context_s: list[float]
    prefill_context_s: float
    """Per unit of `BatchShape.prefill_context_tokens`."""
    median_error: float = 0.0
    """Relative error of the fit over the measured points."""
    p90_error: float = 0.0

    def __post_init__(self) -> None:
        for axis in (self.decode_axis, self.prefill_axis, self.context_axis):
            if not axis or axis != sorted(set(axis)) or axis[0] < 0:
                raise ValueError(f"TP{self.degree}: an axis must hold rising counts")
        self._check_sizes()
        self._check_monotone()

    def _check_sizes(self) -> None:
        widths = {len(row) for row in self.dense_s}
        if len(self.dense_s) != len(self.decode_axis) or widths != {len(self.prefill_axis)}:
            raise ValueError(f"TP{self.degree}: dense_s does not fit its axes")
        if len(self.context_s) != len(self.context_axis):
            raise ValueError(f"TP{self.degree}: context_s does not fit its axis")

    def _check_monotone(self) -> None:
        columns = [list(column) for column in zip(*self.dense_s, strict=True)]
        for line in (*self.dense_s, *columns, self.context_s, [0.0, self.prefill_context_s]):
            if line != sorted(line) or line[0] < 0.0:
                raise ValueError(f"TP{self.degree}: times must be positive and never fall")


class CostTable(msgspec.Struct, frozen=True, kw_only=True):
    """The file: one table per degree, KV copies, and where it all comes from."""

    format: Literal["nitsum-cost-1"] = "nitsum-cost-1"
    model: str
    provenance: Provenance
    degrees: list[DegreeTable]
    move: LinearRate
    offload: LinearRate


def save_table(table: CostTable, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")


def load_table(path: Path) -> CostTable:
    """Read a table; raises `ConfigError` saying what is wrong with the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostTable)
    except OSError as error:
        raise ConfigError(f"Cannot read cost table {path}: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cost table {path}: {error}. Measure it anew.") from error


class TableCost:
    """A `CostModel` over a `CostTable`: two searches and a few multiplications a call."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._degrees = {entry.degree: _Lookup(entry) for entry in table.degrees}
        if not self._degrees:
            raise ConfigError("The cost table holds no degree; measure at least one.")

    @classmethod
    def load(cls, path: Path) -> TableCost:
        return cls(load_table(path))

    def step_time(self, lane: Lane, batch: BatchShape) -> float:
        lookup = self._degrees.get(lane.group.degree)
        if lookup is None:
            raise ConfigError(
                f"The cost table has no steps at TP{lane.degree}, only at "
                f"{sorted(self._degrees)}. Measure that degree or drop the lane."
            )
        return lookup.seconds(batch)

    def move_time(self, num_bytes: int) -> float:
        return self.table.move.seconds(num_bytes)

    def offload_time(self, num_bytes: int) -> float:
        return self.table.offload.seconds(num_bytes)


class _Lookup:
    """One degree's table, laid out for the hot path."""

    __slots__ = ("decode", "dense", "entry", "prefill")

    def __init__(self, entry: DegreeTable) -> None:
        self.entry = entry
        self.dense = entry.dense_s
        # The edges that were measured: a full step of prompts has no place for decodes beside it,
        # so that corner of the grid is filled in, and flat.
        self.decode = _Axis(entry.decode_axis, [row[0] for row in self.dense])
        self.prefill = _Axis(entry.prefill_axis, self.dense[0])

    def seconds(self, batch: BatchShape) -> float:
        entry = self.entry
        context = batch.decode_context_tokens
        context_s = interpolate(entry.context_axis, entry.context_s, context) if context else 0.0
        prefill_s = entry.prefill_context_s * batch.prefill_context_tokens
        return self._dense(batch.num_decode, batch.prefill_tokens) + context_s + prefill_s

    def _dense(self, num_decode: int, prefill_tokens: int) -> float:
        """Bilinear inside the grid; beyond an axis the slope of its last segment goes on."""
        i, k, u, beyond_decode_s = self.decode.locate(num_decode)
        j, n, v, beyond_prefill_s = self.prefill.locate(prefill_tokens)
        near, far = self.dense[i], self.dense[k]
        low = near[j] + (near[n] - near[j]) * v
        high = far[j] + (far[n] - far[j]) * v
        return low + (high - low) * u + beyond_decode_s + beyond_prefill_s


class _Axis:
    """Knots of one count, and the price per unit beyond the last of them."""

    __slots__ = ("knots", "last", "slope_s")

    def __init__(self, knots: list[int], edge_s: list[float]) -> None:
        self.knots = knots
        self.last = len(knots) - 1
        rise = edge_s[-1] - edge_s[-2] if self.last else 0.0
        self.slope_s = rise / (knots[-1] - knots[-2]) if self.last else 0.0

    def locate(self, x: int) -> tuple[int, int, float, float]:
        """Knots around `x`, the way from one to the other (0..1), and seconds beyond the last."""
        knots, last = self.knots, self.last
        if x >= knots[last]:
            return last, last, 0.0, (x - knots[last]) * self.slope_s
        if x <= knots[0]:
            return 0, 0, 0.0, 0.0
        i = bisect_right(knots, x)
        low = knots[i - 1]
        return i - 1, i, (x - low) / (knots[i] - low), 0.0
