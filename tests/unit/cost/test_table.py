"""Tables: monotone whatever was measured, exact on their own points, honest about bad files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.correct import CorrectedCost
from nitsum.cost.fit import (
    StepPoint,
    fit_degree,
    fit_table,
    main,
    non_negative_least_squares,
    read_points,
    relative_errors,
    sample_points,
)
from nitsum.cost.machines import Machine
from nitsum.cost.protocol import FixedCost
from nitsum.cost.rates import LinearRate
from nitsum.cost.shapes import SHAPES
from nitsum.cost.table import CostTable, DegreeTable, Provenance, TableCost, load_table, save_table
from nitsum.errors import ConfigError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

ANALYTIC = AnalyticCost(SHAPES["Llama-3.1-8B"], Machine.parse("2xH100"))
LANE = Lane(Group(1, 0))


def table_of(points: list[StepPoint]) -> CostTable:
    return fit_table(
        points,
        model="Llama-3.1-8B",
        provenance=Provenance(
            kind="analytic", hardware="2xH100", versions={}, date="2026-11-23", command="test"
        ),
        move=LinearRate(1e-5, 3e11),
        offload=LinearRate(1e-5, 3e10),
    )


GRID = {"num_decodes": (0, 1, 8, 64, 256), "chunks": (0, 128, 512, 2048)}


@st.composite
def noisy_points(draw: st.DrawFn) -> list[StepPoint]:
    points = sample_points(ANALYTIC, (1,), **GRID)
    noise = draw(st.lists(st.floats(0.3, 3.0), min_size=len(points), max_size=len(points)))
    return [
        msgspec.structs.replace(p, seconds=p.seconds * n)
        for p, n in zip(points, noise, strict=True)
    ]


counts = st.tuples(
    st.integers(0, 600), st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 10**7)
)


@settings(max_examples=15)
@given(noisy_points(), st.lists(st.tuples(counts, counts), min_size=20, max_size=20))
def test_a_fit_of_noise_is_still_monotone(
    points: list[StepPoint],
    pairs: list[tuple[tuple[int, int, int, int], tuple[int, int, int, int]]],
) -> None:
    cost = TableCost(table_of(points))
    for a, b in pairs:
        less = cost.step_time(LANE, BatchShape(*a))
        more = cost.step_time(LANE, BatchShape(*(x + y for x, y in zip(a, b, strict=True))))
        assert more >= less * (1 - 1e-9)


def test_a_fit_recovers_what_it_was_made_from() -> None:
    points = sample_points(ANALYTIC, (1, 2), **GRID)
    table = table_of(points)
    assert max(relative_errors(TableCost(table), points)) < 0.01
    assert [entry.degree for entry in table.degrees] == [1, 2]
    assert table.degrees[0].p90_error < 0.01


def test_between_grid_points_the_table_is_near_the_model() -> None:
    cost = TableCost(table_of(sample_points(ANALYTIC, (1,))))
    held_out = sample_points(
        ANALYTIC, (1,), num_decodes=(3, 20, 100, 200), chunks=(0, 200, 700), contexts=(500, 3000)
    )
    assert max(relative_errors(cost, held_out)) < 0.05


def test_the_price_of_context_is_found_despite_batches() -> None:
    def seconds(n: int, context: int) -> float:
        return 0.01 + 1e-5 * n + 2e-9 * context

    points = [
        StepPoint(
            degree=1,
            num_decode=n,
            decode_context_tokens=n * c,
            prefill_tokens=0,
            prefill_context_tokens=0,
            seconds=seconds(n, n * c),
        )
        for n in (1, 8, 64)
        for c in (100, 1000, 5000)
    ]
    entry = fit_degree(points)
    assert entry.context_s[-1] == pytest.approx(2e-9 * 64 * 5000, rel=1e-3)
    assert [row[0] for row in entry.dense_s] == pytest.approx(
        [seconds(n, 0) for n in (1, 8, 64)], rel=1e-3
    )


def test_one_context_per_batch_is_not_enough() -> None:
    points = sample_points(ANALYTIC, (1,), contexts=(512,), chunks=(0,))
    with pytest.raises(ConfigError, match="at least two contexts"):
        fit_degree(points)


@given(st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3), st.integers(0, 2**32))
def test_least_squares_finds_prices_and_never_a_negative_one(
    prices: list[float], seed: int
) -> None:
    rng = random.Random(seed)
    columns = [[rng.uniform(-1, 1) for _ in range(30)] for _ in prices]
    rows = zip(*columns, strict=True)
    target = [sum((p * c for p, c in zip(prices, row, strict=True)), 0.0) for row in rows]
    found = non_negative_least_squares(columns, target, [1.0] * 30)
    assert found == pytest.approx(prices, abs=1e-2)
    flipped = non_negative_least_squares(columns, [-t for t in target], [1.0] * 30)
    assert min(flipped) >= 0.0


def test_beyond_the_grid_the_last_slope_goes_on() -> None:
    entry = DegreeTable(
        degree=1,
        decode_axis=[0, 10],
        prefill_axis=[0, 100],
        dense_s=[[1.0, 3.0], [2.0, 3.5]],
        context_axis=[0],
        context_s=[0.0],
        prefill_context_s=0.0,
    )
    cost = TableCost(msgspec.structs.replace(table_of(_few_points()), degrees=[entry]))

    def at(decode: int, prefill: int) -> float:
        return cost.step_time(LANE, BatchShape(decode, 0, prefill))

    assert (at(0, 0), at(10, 100), at(5, 50)) == pytest.approx((1.0, 3.5, 2.375))
    assert at(20, 100) == pytest.approx(4.5)
    assert at(10, 300) == pytest.approx(7.5)


def test_beyond_the_largest_step_prompts_cost_what_they_did_where_they_were_measured() -> None:
    """A full step of prompts has no place for decodes: beside them the last cells are filled in,
    here as flat as isotonic filling makes them."""
    entry = DegreeTable(
        degree=1,
        decode_axis=[0, 10],
        prefill_axis=[0, 50, 100],
        dense_s=[[1.0, 2.0, 3.0], [2.0, 3.0, 3.0]],
        context_axis=[0],
        context_s=[0.0],
        prefill_context_s=0.0,
    )
    cost = TableCost(msgspec.structs.replace(table_of(_few_points()), degrees=[entry]))
    assert cost.step_time(LANE, BatchShape(10, 0, 200)) == pytest.approx(3.0 + 2.0)


def _few_points() -> list[StepPoint]:
    return sample_points(ANALYTIC, (1,), num_decodes=(1, 8), chunks=(0,))


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    table = table_of(_few_points())
    path = tmp_path / "cost.json"
    save_table(table, path)
    assert load_table(path) == table
    assert TableCost.load(path).move_time(3 * 10**11) == pytest.approx(1.00001)


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    with pytest.raises(ConfigError, match="No such file"):
        load_table(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="truncated"):
        load_table(path)
    save_table(table_of(_few_points()), path)
    content = json.loads(path.read_text())
    content["degrees"][0]["dense_s"][0][0] = 99.0
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="never fall"):
        load_table(path)


def test_a_degree_that_was_not_measured_is_refused() -> None:
    cost = TableCost(table_of(_few_points()))
    with pytest.raises(ConfigError, match="TP2"):
        cost.step_time(Lane(Group(2, 0)), BatchShape(1))


def test_the_command_fits_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, out = tmp_path / "points.jsonl", tmp_path / "table.json"
    lines = [msgspec.json.encode(p) for p in _few_points()]
    points.write_bytes(b"\n".join(lines))
    argv = [str(points), "--model", "m", "--hardware", "h", "--out", str(out)]
    assert main([*argv, "--version", "torch=2.11"]) == 0
    assert "TP1" in capsys.readouterr().out
    assert load_table(out).provenance.versions == {"torch": "2.11"}
    points.write_bytes(lines[0] + b"\n{}\n")
    assert main(argv) == 2
    assert "line 2" in capsys.readouterr().err


def test_points_need_positive_times(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    zero = msgspec.structs.replace(_few_points()[0], seconds=0.0)
    path.write_bytes(msgspec.json.encode(zero))
    with pytest.raises(ConfigError, match="line 1: seconds must be positive"):
        read_points(path)


def test_corrections_follow_the_machine() -> None:
    cost = CorrectedCost(FixedCost(), weight=0.1)
    batch = BatchShape(4)
    before = cost.step_time(LANE, batch)
    for _ in range(200):
        cost.observe(LANE, batch, 1.5 * before)
    assert cost.step_time(LANE, batch) == pytest.approx(1.5 * before)
    other = Lane(Group(2, 0))
    assert cost.step_time(other, batch) == pytest.approx(1.5 * before), "the machine's, till known"
    cost.observe(other, batch, before)
    assert cost.step_time(other, batch) == pytest.approx(1.45 * before)
    for _ in range(200):
        cost.observe(other, batch, before)
    assert cost.step_time(other, batch) == pytest.approx(before)
    assert cost.step_time(LANE, batch) == pytest.approx(1.5 * before)
    for _ in range(200):
        cost.observe(LANE, batch, 1000 * before)
    assert cost.step_time(LANE, batch) <= 4.0 * before
