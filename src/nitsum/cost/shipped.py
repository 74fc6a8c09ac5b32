"""Step times that come with the package: of machines and shapes that somebody measured.

One file each, `data/steps_MACHINE_SHAPE.json`, named as `Machine` and `SHAPES` name them. They are
of bfloat16 weights and of every degree the machine has.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from nitsum.cost.machines import Machine
from nitsum.cost.shapes import SHAPES
from nitsum.cost.table import CostTable, TableCost
from nitsum.shape import ModelShape

ANALYTIC = "analytic"
"""In place of a file of step times: the analytic model, also where there is a table."""


def shipped_table(shape: ModelShape, machine: Machine, dtype: str) -> Traversable | None:
    """The file measured on exactly this machine with this much work, if there is one."""
    if dtype != "bfloat16":
        return None
    for name, known in SHAPES.items():
        path = files("nitsum.cost") / "data" / f"steps_{machine}_{name}.json"
        if same_work(known, shape) and path.is_file():
            return path
    return None


def shipped_cost(shape: ModelShape, machine: Machine, dtype: str) -> TableCost | None:
    """What is in that file."""
    path = shipped_table(shape, machine, dtype)
    if path is None:
        return None
    return TableCost(msgspec.json.decode(path.read_bytes(), type=CostTable))


def chosen_cost(words: str, shape: ModelShape, machine: Machine, dtype: str) -> TableCost | None:
    """What a user asked for: a file, `analytic`, or nothing in particular.

    None is the analytic model. Raises `ConfigError` for a file that cannot be read.
    """
    if words == ANALYTIC:
        return None
    return TableCost.load(Path(words)) if words else shipped_cost(shape, machine, dtype)


def same_work(one: ModelShape, other: ModelShape) -> bool:
    """Whether a step of the one takes what a step of the other does."""
    return _work(one) == _work(other)


def _work(shape: ModelShape) -> ModelShape:
    """The shape without what changes no step's time."""
    plain = SHAPES["Llama-3.1-8B"]
    return replace(
        shape,
        family=plain.family,
        max_positions=plain.max_positions,
        rms_eps=plain.rms_eps,
        rope=plain.rope,
        eos_token_ids=(),
        bos_token_id=None,
    )
