"""Measured kernels, as calibration reads them.

Two formats of CSV each, told apart by their header:

* the profiles of the Vidur simulator (one row a shape, times in ms),
* ours: `rows,outputs,inputs,degree,hidden,seconds` for GEMMs and `ranks,bytes,seconds` for
  all-reduces.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from nitsum.errors import ConfigError

_BF16_BYTES = 2
_MS = 1e-3

T = TypeVar("T")


class GemmPoint(NamedTuple):
    """`x[rows, inputs] @ w[outputs, inputs].T`, as rank of a lane of `degree`."""

    rows: int
    outputs: int
    inputs: int
    degree: int
    hidden: int
    """The model's width: the four GEMMs of one layer share it."""
    seconds: float


class ElementwisePoint(NamedTuple):
    rows: int
    degree: int
    num_bytes: int
    """Read and written."""
    seconds: float


class AllReducePoint(NamedTuple):
    ranks: int
    num_bytes: int
    """Of the reduced tensor."""
    seconds: float


def read_gemms(path: Path) -> list[GemmPoint]:
    """GEMM times of either format; raises `ConfigError` naming file and line."""
    rows = list(_rows(path))
    if "time_stats.attn_pre_proj.median" in rows[0][1]:
        return _each(path, rows, _vidur_gemms)
    return _each(path, rows, _plain_gemm)


def read_elementwise(path: Path) -> list[ElementwisePoint]:
    """Norm, rotary and activation times of a Vidur profile; our format has none."""
    rows = list(_rows(path))
    is_vidur = "time_stats.attn_rope.median" in rows[0][1]
    return _each(path, rows, _vidur_elementwise) if is_vidur else []


def read_all_reduces(path: Path) -> list[AllReducePoint]:
    """All-reduce times of either format, inside one node."""
    rows = list(_rows(path))
    is_vidur = "time_stats.all_reduce.min" in rows[0][1]
    return _each(path, rows, _vidur_all_reduce if is_vidur else _plain_all_reduce)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="") as file:
            rows = list(enumerate(csv.DictReader(file), start=2))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    if not rows:
        raise ConfigError(f"{path} holds no rows.")
    yield from rows


def _each(
    path: Path, rows: list[tuple[int, dict[str, str]]], parse: Callable[[dict[str, str]], list[T]]
) -> list[T]:
    points: list[T] = []
    for line, row in rows:
        try:
            points.extend(parse(row))
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {line}: {error!r}.") from error
    return points


def _plain_gemm(row: dict[str, str]) -> list[GemmPoint]:
    sizes = (int(row[name]) for name in ("rows", "outputs", "inputs", "degree", "hidden"))
    return [GemmPoint(*sizes, seconds=float(row["seconds"]))]


def _plain_all_reduce(row: dict[str, str]) -> list[AllReducePoint]:
    return [AllReducePoint(int(row["ranks"]), int(row["bytes"]), float(row["seconds"]))]


class _VidurShape(NamedTuple):
    rows: int
    degree: int
    hidden: int
    qkv: int
    q_width: int
    mlp: int


def _vidur_shape(row: dict[str, str]) -> _VidurShape:
    degree, hidden = int(row["num_tensor_parallel_workers"]), int(row["n_embd"])
    heads, kv_heads = int(row["n_head"]), int(row["n_kv_head"])
    head_dim = hidden // heads
    return _VidurShape(
        rows=int(row["num_tokens"]),
        degree=degree,
        hidden=hidden,
        qkv=(heads + 2 * max(kv_heads, degree)) * head_dim // degree,
        q_width=heads * head_dim // degree,
        mlp=int(row["n_expanded_embd"]) // degree,
    )


def _median_s(row: dict[str, str], op: str) -> float:
    return float(row[f"time_stats.{op}.median"]) * _MS


def _vidur_gemms(row: dict[str, str]) -> list[GemmPoint]:
    shape = _vidur_shape(row)
    sizes = {
        "attn_pre_proj": (shape.qkv, shape.hidden),
        "attn_post_proj": (shape.hidden, shape.q_width),
        "mlp_up_proj": (2 * shape.mlp, shape.hidden),
        "mlp_down_proj": (shape.hidden, shape.mlp),
    }
    return [
        GemmPoint(shape.rows, n, k, shape.degree, shape.hidden, _median_s(row, op))
        for op, (n, k) in sizes.items()
    ]


def _vidur_elementwise(row: dict[str, str]) -> list[ElementwisePoint]:
    shape = _vidur_shape(row)
    elements = {
        "input_layernorm": 2 * shape.hidden,
        "post_attention_layernorm": 2 * shape.hidden,
        "attn_rope": 2 * shape.qkv,
        "mlp_act": 3 * shape.mlp,
        "add": 3 * shape.hidden,
    }
    return [
        ElementwisePoint(
            shape.rows, shape.degree, shape.rows * count * _BF16_BYTES, _median_s(row, op)
        )
        for op, count in elements.items()
    ]


def _vidur_all_reduce(row: dict[str, str]) -> list[AllReducePoint]:
    """The minimum, not the median: rows below 1 MB carry up to 50 us of host launches."""
    if row["num_workers"] != row["devices_per_node"]:
        return []
    seconds = float(row["time_stats.all_reduce.min"]) * _MS
    return [AllReducePoint(int(row["num_workers"]), int(row["size"]), seconds)]
