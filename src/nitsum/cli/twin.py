"""A served run beside its simulation, as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from nitsum.sim.replay import Pair, StepPair

NO_STEPS = (
    "These events are a client's, which sees no steps. With those of the engine (`nitsum serve "
    "--events FILE`), --compare also says how far the cost of a step lies off."
)


def pair_table(pairs: Iterable[Pair]) -> Table:
    """Latencies and goodput."""
    table = Table("figure", "requests", "served", "simulated", "error")
    for pair in pairs:
        cells = [_value(pair, value) for value in (pair.served, pair.simulated)]
        error = f"{pair.error:+.1%}" if pair.served else "-"
        table.add_row(pair.stem, str(pair.num_samples), *cells, error)
    return table


def _value(pair: Pair, value: float) -> str:
    return f"{value:.3f}/s" if pair.name.endswith("_per_s") else f"{value * 1e3:.1f} ms"


def step_table(pairs: Iterable[StepPair]) -> Table:
    """Medians of step times, by degree."""
    table = Table("steps", "number", "served", "cost model", "error")
    for pair in pairs:
        times = [f"{seconds * 1e3:.2f} ms" for seconds in (pair.served_s, pair.predicted_s)]
        name = f"TP{pair.degree} {pair.kind}"
        table.add_row(name, str(pair.num_steps), *times, f"{pair.error:+.1%}")
    return table
