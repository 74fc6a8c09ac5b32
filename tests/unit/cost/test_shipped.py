"""Step times that come with the package, and whom they are for."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from nitsum.cost.machines import Machine
from nitsum.cost.shapes import SHAPES
from nitsum.cost.shipped import chosen_cost, shipped_cost
from nitsum.cost.table import TableCost
from nitsum.errors import ConfigError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

TWO = Machine.parse("2xH100")
SHAPE = SHAPES["Llama-3.1-8B"]
TABLES = sorted(
    entry.name
    for entry in (files("nitsum.cost") / "data").iterdir()
    if entry.name.startswith("steps_")
)


def test_a_table_is_for_its_machine_and_for_every_model_of_as_much_work() -> None:
    assert shipped_cost(SHAPE, TWO, "bfloat16") is not None
    checkpoint = replace(SHAPE, max_positions=8192, rms_eps=1e-5, eos_token_ids=(7,))
    assert shipped_cost(checkpoint, TWO, "bfloat16") is not None
    assert shipped_cost(replace(SHAPE, vocab_size=32_768), TWO, "bfloat16") is None
    assert shipped_cost(SHAPE, TWO, "float32") is None
    for other in ("H100", "4xH100", "2xA100", "2xH200"):
        assert shipped_cost(SHAPE, Machine.parse(other), "bfloat16") is None


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_every_degree_and_say_where_they_come_from(name: str) -> None:
    _, machine_name, shape_name = name.removesuffix(".json").split("_")
    machine = Machine.parse(machine_name)
    cost = shipped_cost(SHAPES[shape_name], machine, "bfloat16")
    assert cost is not None, "found by the name of its file"
    degrees = [entry.degree for entry in cost.table.degrees]
    assert degrees == [1 << bit for bit in range(machine.num_gpus.bit_length())]
    assert cost.table.model == shape_name
    found = cost.table.provenance
    assert found.kind == "measured"
    assert all((found.hardware, found.versions, found.date, found.command, found.notes))
    assert all(entry.p90_error < 0.1 for entry in cost.table.degrees)


def test_steps_it_was_not_scaled_to_are_as_it_says() -> None:
    """Medians of steps of 256 clients on 2x H100."""
    cost = shipped_cost(SHAPE, TWO, "bfloat16")
    assert cost is not None
    for degree, batch, seconds in (
        (2, BatchShape(64, 64 * 1270, 0, 0, 64), 6.24e-3),
        (2, BatchShape(150, 150 * 1260, 874, 560_000, 151), 19.73e-3),
        (1, BatchShape(120, 120 * 1260, 904, 560_000, 121), 31.84e-3),
        (1, BatchShape(40, 40 * 1260, 0, 0, 40), 8.44e-3),
    ):
        found_s = cost.step_time(Lane(Group(degree, 0)), batch)
        assert found_s == pytest.approx(seconds, rel=0.08)


def test_a_user_chooses(tmp_path: Path) -> None:
    assert chosen_cost("analytic", SHAPE, TWO, "bfloat16") is None
    assert isinstance(chosen_cost("", SHAPE, TWO, "bfloat16"), TableCost)
    with pytest.raises(ConfigError, match="Cannot read cost table"):
        chosen_cost(str(tmp_path / "none.json"), SHAPE, TWO, "bfloat16")
