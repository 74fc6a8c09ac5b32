"""`nitsum profile`: the grid, the partial file, and a real table from tiny workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nitsum.bench.profile import (
    Grid,
    Partial,
    Profiler,
    Shape,
    linear_rate,
    measure_points,
    shapes_of,
)
from nitsum.cli import main
from nitsum.cost.table import TableCost
from nitsum.engine.guess import checked_table
from nitsum.errors import ConfigError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

GRID = Grid((0, 1, 4), (0, 16, 60, 64), (32, 128), 64, 4)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 256,
}


class Counting(Profiler):
    """Does not measure: says how often it was asked."""

    def __init__(self, fail_after: int) -> None:
        self.num_asked = 0
        self.fail_after = fail_after

    def measure(self, shape: Shape) -> float:
        self.num_asked += 1
        if self.num_asked > self.fail_after:
            raise KeyboardInterrupt
        return 0.001 * (1 + shape.num_decode + shape.chunk)


def test_no_step_is_empty_or_larger_than_a_step_may_be():
    shapes = shapes_of(GRID, (1, 2), lambda degree: 10**6)
    assert len(set(shapes)) == len(shapes)
    assert all(0 < shape.num_decode + shape.chunk <= 64 for shape in shapes)
    assert {shape.degree for shape in shapes} == {1, 2}


def test_a_prompt_beside_decodes_needs_a_sequence_of_its_own():
    shapes = shapes_of(GRID, (1,), lambda degree: 10**6)
    assert any(shape.num_decode == 4 for shape in shapes)
    assert not any(shape.num_decode == 4 and shape.chunk for shape in shapes)


def test_steps_that_do_not_fit_the_arena_are_left_out():
    shapes = shapes_of(GRID, (1,), lambda degree: 200)
    assert shapes
    assert all(s.num_decode * s.context + s.before + s.chunk < 200 for s in shapes)


def test_a_broken_off_run_goes_on_where_it_was(tmp_path: Path):
    partial = Partial(tmp_path / "cost.json.partial")
    shapes = shapes_of(GRID, (1,), lambda degree: 10**6)
    with pytest.raises(KeyboardInterrupt):
        measure_points(Counting(5), shapes, partial, lambda done, total, word: None)
    with partial.path.open("ab") as file:
        file.write(b'{"shape": {"degree"')  # the line that was being written
    again = Counting(1000)
    points = measure_points(again, shapes, partial, lambda done, total, word: None)
    assert again.num_asked == len(shapes) - 5
    assert len(points) == len(shapes)


def test_a_rate_from_sizes():
    rate = linear_rate([(n, 0.001 + n / 2e9) for n in (10**5, 10**6, 10**7)])
    assert rate.launch_s == pytest.approx(0.001)
    assert rate.bytes_per_s == pytest.approx(2e9)


@pytest.mark.processes
def test_tiny_workers_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    model, out = tmp_path / "model", tmp_path / "cost.json"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    words = ["profile", str(model), "--ranks", "2", "--load-format", "dummy", "--threads", "1"]
    words += ["--max-num-seqs", "4", "--max-batch-tokens", "20", "--kv-memory", "4MiB"]
    assert main([*words, "-o", str(out)]) == 0
    assert "Error of the fit" in capsys.readouterr().out
    assert not out.with_suffix(".json.partial").exists()
    cost = TableCost.load(out)
    for degree in (1, 2):
        assert cost.step_time(Lane(Group(degree, 0)), BatchShape(4, 256, 16, 136, 5)) > 0.0
    assert cost.table.provenance.kind == "measured"
    assert not cost.table.offload.measured
    with pytest.raises(ConfigError, match="no steps at TP4"):
        checked_table(out, (1, 4))
