"""What steps take before any was seen: the engine corrects it by those it sees."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Gpu, Machine, gpu_by_driver, gpu_named
from nitsum.cost.protocol import CostModel
from nitsum.cost.shipped import ANALYTIC, shipped_cost
from nitsum.cost.site import ModelSite
from nitsum.cost.table import TableCost
from nitsum.plan import Group, Lane
from nitsum.shape import ModelShape
from nitsum.step import BatchShape


def given_cost(config: EngineConfig) -> TableCost | None:
    """The table that was asked for, if it was one, before workers start; raises `ConfigError` when
    it cannot be used."""
    if config.cost in ("", ANALYTIC):
        return None
    return checked_table(Path(config.cost), config.plans.degrees)


def checked_table(path: Path, degrees: Iterable[int]) -> TableCost:
    """A measured table that knows every degree; raises `ConfigError` when it does not."""
    cost = TableCost.load(path)
    for degree in degrees:
        cost.step_time(Lane(Group(degree, 0)), BatchShape(1, 1, 0, 0, 1))
    return cost


def first_guess(
    config: EngineConfig, shape: ModelShape, driver_name: str, given: TableCost | None
) -> CostModel:
    """The table that was `given`, or the analytic model if that was asked for; in want of a word,
    the table that comes with Nitsum for these devices, which their driver calls `driver_name`, and
    this shape."""
    gpu = _gpu(config, driver_name)
    machine = Machine(gpu or gpu_named("H100"), config.num_ranks)
    if given is None and gpu is not None and config.cost != ANALYTIC:
        given = shipped_cost(shape, machine, config.dtype)
    site = ModelSite(shape=shape, machine=machine, dtype=config.dtype, cost=given)
    return site.cost_model(config.min_tp, config.max_tp)


def guess_words(cost: CostModel, config: EngineConfig, driver_name: str) -> str:
    """Where the first step times come from, for whoever starts a server; on devices that nothing
    is known of, what to do about it."""
    if isinstance(cost, TableCost):
        found = cost.table.provenance
        source = f"measured with {cost.table.model} on {found.hardware}, {found.date}"
    elif isinstance(cost, AnalyticCost):
        source = f"an analytic model of {cost.machine}"
        if _gpu(config, driver_name) is None:
            source += f", since {driver_name or 'this GPU'} is unknown. {_measuring(config)}"
    else:
        source = "given"
    return f"Step times to begin with: {source}."


def _measuring(config: EngineConfig) -> str:
    words = f"nitsum profile {config.model} --ranks {config.num_ranks} --device {config.device}"
    return f"Measure it with `{words} -o cost.json` and serve with `--cost cost.json`"


def _gpu(config: EngineConfig, driver_name: str) -> Gpu | None:
    return gpu_named("CPU") if config.device == "cpu" else gpu_by_driver(driver_name)
