"""Trace readers: real formats, streaming, errors that name the line."""

from __future__ import annotations

import gzip
from itertools import islice
from pathlib import Path

import pytest

from nitsum.errors import ConfigError
from nitsum.workload.traces import TraceRow, read_trace, sped_up, window

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-16 18:18:04.0319600,110,27\r\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'
    '{"timestamp": 2500, "input_length": 520, "output_length": 6, "hash_ids": [7, 9]}\n'
)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, newline="")
    return path


def test_azure(tmp_path: Path) -> None:
    rows = list(read_trace(written(tmp_path, "a.csv", AZURE)))
    assert [(r.num_prompt, r.num_output) for r in rows] == [(4808, 10), (3180, 8), (110, 27)]
    assert [r.at_s for r in rows] == pytest.approx([0.0, 0.052, 60.052])


def test_mooncake_packed_or_not(tmp_path: Path) -> None:
    plain = list(read_trace(written(tmp_path, "m.jsonl", MOONCAKE)))
    assert plain == [TraceRow(0.0, 600, 5, (7, 8)), TraceRow(2.5, 520, 6, (7, 9))]
    packed = tmp_path / "m.jsonl.gz"
    packed.write_bytes(gzip.compress(MOONCAKE.encode()))
    assert list(read_trace(packed)) == plain


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path, "m.jsonl", MOONCAKE + "not json\n")
    rows = read_trace(path)
    assert len(list(islice(rows, 2))) == 2
    with pytest.raises(ConfigError, match="line 3"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", AZURE + "2023-11-16 18:19:04,x,1\r\n", "line 5"),
        ("a.csv", AZURE + "yesterday,1,1\r\n", "line 5"),
        ("a.csv", AZURE + "2023-11-16 18:19:04,5\r\n", "line 5"),
        ("a.csv", AZURE + "2023-11-16 18:00:00,1,1\r\n", "line 5: its time"),
        ("a.csv", "TIMESTAMP,Tokens\r\n", "line 1: no column ContextTokens, GeneratedTokens"),
        ("m.jsonl", MOONCAKE + '{"timestamp": 1}\n', "line 3"),
        ("m.jsonl", MOONCAKE.replace("600", "-600"), "line 1: a count"),
        ("m.parquet", "", "a trace is a .csv"),
    ],
)
def test_bad_traces_say_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(read_trace(written(tmp_path, name, text)))


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        list(read_trace(tmp_path / "none.csv"))


def test_windows_and_speed() -> None:
    rows = [TraceRow(float(t), t, 1) for t in range(10)]
    cut = list(window(rows, 3.0, 4.0))
    assert [(r.at_s, r.num_prompt) for r in cut] == [(0, 3), (1, 4), (2, 5), (3, 6)]
    assert [r.at_s for r in sped_up(rows, 2.0)][-1] == 4.5
