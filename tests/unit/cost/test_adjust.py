"""A table scaled to the steps of another machine."""

from __future__ import annotations

import msgspec
import pytest

from nitsum.cost.adjust import Scale, adjusted, scaled
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.fit import StepPoint, fit_table, sample_points
from nitsum.cost.machines import Machine
from nitsum.cost.rates import LinearRate
from nitsum.cost.shapes import shape_named
from nitsum.cost.table import CostTable, DegreeTable, Provenance, TableCost
from nitsum.errors import ConfigError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape

BATCHES = [
    BatchShape(decodes, 900 * decodes, chunk, 500 * chunk, decodes)
    for decodes in (0, 1, 20, 100)
    for chunk in (0, 100, 700)
    if decodes or chunk
]


def table() -> CostTable:
    cost = AnalyticCost(shape_named("Llama-3.1-8B"), Machine.parse("2xH100"))
    points = sample_points(
        cost, (1, 2), num_decodes=(0, 1, 16, 128), chunks=(0, 64, 512, 1024), contexts=(128, 2048)
    )
    nothing = Provenance(kind="measured", hardware="", versions={}, date="", command="")
    rate = LinearRate(0.0, 1e9)
    return fit_table(points, model="m", provenance=nothing, move=rate, offload=rate)


def served(cost: TableCost, degree: int, batches: list[BatchShape]) -> list[StepPoint]:
    return [
        StepPoint(
            degree=degree,
            num_decode=batch.num_decode,
            decode_context_tokens=batch.decode_context_tokens,
            prefill_tokens=batch.prefill_tokens,
            prefill_context_tokens=batch.prefill_context_tokens,
            seconds=cost.step_time(Lane(Group(degree, 0)), batch),
        )
        for batch in batches
    ]


def other_machine(table: CostTable, scale: Scale) -> TableCost:
    degrees = [scaled(entry, scale) for entry in table.degrees]
    return TableCost(msgspec.structs.replace(table, degrees=degrees))


def test_the_factors_of_another_machine_are_found_and_its_steps_predicted() -> None:
    mine = table()
    truth = other_machine(mine, Scale(0.95, 0.65))
    found, scales = adjusted(mine, served(truth, 2, BATCHES))
    assert scales == {2: pytest.approx((0.95, 0.65), abs=1e-3)}
    lane, batch = Lane(Group(2, 0)), BatchShape(60, 60_000, 300, 90_000, 61)
    assert TableCost(found).step_time(lane, batch) == pytest.approx(
        truth.step_time(lane, batch), rel=2e-3
    )
    assert found.degrees[1].p90_error < 2e-3
    assert found.degrees[0] == mine.degrees[0], "a degree nobody served stays as it was"


def test_one_kind_of_step_speaks_for_both() -> None:
    mine = table()
    truth = other_machine(mine, Scale(2.0, 2.0))
    decodes = [batch for batch in BATCHES if not batch.prefill_tokens]
    _, scales = adjusted(mine, served(truth, 1, decodes))
    assert scales == {1: pytest.approx((2.0, 2.0), rel=1e-6)}


def test_steps_that_grow_never_get_cheaper_whatever_the_factors() -> None:
    """Prompts beside many decodes add less than alone: weighed more, they could seem to fall."""
    entry = DegreeTable(
        degree=1,
        decode_axis=[0, 10],
        prefill_axis=[0, 100],
        dense_s=[[1.0, 3.0], [2.5, 3.0]],
        context_axis=[0],
        context_s=[0.0],
        prefill_context_s=0.0,
    )
    assert scaled(entry, Scale(0.5, 2.0)).dense_s == [[0.5, 4.5], [1.25, 4.5]]


def test_steps_at_other_degrees_are_refused() -> None:
    mine = msgspec.structs.replace(table(), degrees=table().degrees[:1])
    with pytest.raises(ConfigError, match="No step was served at a degree"):
        adjusted(mine, served(TableCost(table()), 2, BATCHES))
