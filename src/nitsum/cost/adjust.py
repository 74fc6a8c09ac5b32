"""A measured table brought to the machine that serves: two factors a degree.

Machines of one kind read memory alike and may multiply at different clocks. So what a step
takes for its decodes and what its prompts add are scaled apart, each by one factor, found by least
squares of relative errors over the steps an engine took. More would fit the load of one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from nitsum.cost.fit import (
    StepPoint,
    non_negative_least_squares,
    p90,
    relative_errors,
    running_maximum,
)
from nitsum.cost.table import CostTable, DegreeTable, TableCost
from nitsum.errors import ConfigError
from nitsum.plan import Group, Lane
from nitsum.step import BatchShape


class Scale(NamedTuple):
    """Multipliers of a degree's step times."""

    decode: float
    """Of a step's decodes alone; of its fixed part, too."""
    prompt: float
    """Of what prompts add to that."""


def adjusted(table: CostTable, points: Sequence[StepPoint]) -> tuple[CostTable, dict[int, Scale]]:
    """The table scaled to `points`, and by how much; degrees without points stay as they are.

    Errors of the fit are those over `points`. Raises `ConfigError` when no point is of a degree
    that the table has.
    """
    scales: dict[int, Scale] = {}
    degrees: list[DegreeTable] = []
    for entry in table.degrees:
        mine = [point for point in points if point.degree == entry.degree]
        if mine:
            scales[entry.degree] = _scale(TableCost(table), mine)
            entry = scaled(entry, scales[entry.degree])
            bare = msgspec.structs.replace(table, degrees=[entry])
            errors = relative_errors(TableCost(bare), mine)
            entry = msgspec.structs.replace(
                entry, median_error=statistics.median(errors), p90_error=p90(errors)
            )
        degrees.append(entry)
    if not scales:
        raise ConfigError("No step was served at a degree of the cost table.")
    return msgspec.structs.replace(table, degrees=degrees), scales


def _scale(cost: TableCost, points: Sequence[StepPoint]) -> Scale:
    decodes = [_decodes_alone_s(cost, point) for point in points]
    prompts = [
        cost.step_time(_lane(point), point.batch) - alone_s
        for point, alone_s in zip(points, decodes, strict=True)
    ]
    seconds = [point.seconds for point in points]
    weights = [1.0 / point.seconds**2 for point in points]
    decode, prompt = non_negative_least_squares([decodes, prompts], seconds, weights)
    # Where one kind of step was never served, the other says what there is to know.
    return Scale(decode or prompt, prompt or decode)


def _decodes_alone_s(cost: TableCost, point: StepPoint) -> float:
    """The step without its prompts."""
    num_decode, context = point.num_decode, point.decode_context_tokens
    return cost.step_time(_lane(point), BatchShape(num_decode, context, 0, 0, num_decode))


def _lane(point: StepPoint) -> Lane:
    return Lane(Group(point.degree, 0))


def scaled(entry: DegreeTable, scale: Scale) -> DegreeTable:
    """Every time of a degree by its factor, never falling as counts grow."""
    grid = [
        [scale.decode * row[0] + scale.prompt * (value - row[0]) for value in row]
        for row in entry.dense_s
    ]
    return msgspec.structs.replace(
        entry,
        dense_s=running_maximum(grid),
        context_s=[scale.decode * value for value in entry.context_s],
        prefill_context_s=scale.prompt * entry.prefill_context_s,
    )
