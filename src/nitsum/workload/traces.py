"""Readers of published traces. They stream: one row at a time, errors with their line."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from nitsum.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


class TraceRow(NamedTuple):
    """One request of a trace."""

    at_s: float
    """Since the trace's first request."""
    num_prompt: int
    num_output: int
    prefix_hashes: tuple[int, ...] = ()
    """Of the prompt's blocks of 512 tokens; equal hashes mean equal tokens up to there."""


def read_trace(path: Path) -> Iterator[TraceRow]:
    """Azure CSV or Mooncake JSONL, by the file's name (`.gz` may follow)."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return read_azure(path)
    if name.endswith(".jsonl"):
        return read_mooncake(path)
    raise ConfigError(f"{path}: a trace is a .csv (Azure) or .jsonl (Mooncake), maybe with .gz.")


def read_azure(path: Path) -> Iterator[TraceRow]:
    """AzureLLMInferenceTrace 2023: `TIMESTAMP,ContextTokens,GeneratedTokens`.

    Raises `ConfigError` naming the line for a bad row, a missing column or a time that falls.
    """
    with _opened(path) as file:
        rows = csv.DictReader(file)
        missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(rows.fieldnames or ())
        if missing:
            raise ConfigError(f"{path}, line 1: no column {', '.join(sorted(missing))}.")
        yield from _from_zero(path, ((rows.line_num, _azure_row(path, rows, row)) for row in rows))


def _azure_row(path: Path, rows: csv.DictReader[str], row: dict[str, str]) -> TraceRow:
    try:
        return TraceRow(
            datetime.fromisoformat(row["TIMESTAMP"]).timestamp(),
            int(row["ContextTokens"]),
            int(row["GeneratedTokens"]),
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}, line {rows.line_num}: {error}.") from error


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_mooncake(path: Path) -> Iterator[TraceRow]:
    """Mooncake's release: one JSON object a line, times in milliseconds.

    Raises `ConfigError` naming the line for a bad row or a time that falls.
    """
    decoder = msgspec.json.Decoder(_MooncakeRow)
    with _opened(path) as file:
        lines = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
        yield from _from_zero(
            path, ((n, _mooncake_row(path, n, line, decoder)) for n, line in lines)
        )


def _mooncake_row(
    path: Path, number: int, line: str, decoder: msgspec.json.Decoder[_MooncakeRow]
) -> TraceRow:
    try:
        row = decoder.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}, line {number}: {error}.") from error
    return TraceRow(row.timestamp / 1000.0, row.input_length, row.output_length, row.hash_ids)


def _opened(path: Path) -> IO[str]:
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"Cannot read trace {path}: {error.strerror}.") from error


def _from_zero(path: Path, rows: Iterable[tuple[int, TraceRow]]) -> Iterator[TraceRow]:
    """Times counted from the first row; counts and order checked."""
    first_s, last_s = None, 0.0
    for number, row in rows:
        first_s = row.at_s if first_s is None else first_s
        at_s = row.at_s - first_s
        if at_s < last_s:
            raise ConfigError(f"{path}, line {number}: its time lies before the line above.")
        if row.num_prompt < 0 or row.num_output < 0:
            raise ConfigError(f"{path}, line {number}: a count of tokens is negative.")
        last_s = at_s
        yield row._replace(at_s=at_s)


def window(rows: Iterable[TraceRow], start_s: float, length_s: float) -> Iterator[TraceRow]:
    """The rows of `start_s .. start_s + length_s`, times counted from `start_s`."""
    for row in rows:
        if row.at_s >= start_s + length_s:
            return
        if row.at_s >= start_s:
            yield row._replace(at_s=row.at_s - start_s)


def sped_up(rows: Iterable[TraceRow], factor: float) -> Iterator[TraceRow]:
    """The same rows `factor` times as fast: rates scale, order and burstiness stay."""
    for row in rows:
        yield row._replace(at_s=row.at_s / factor)
