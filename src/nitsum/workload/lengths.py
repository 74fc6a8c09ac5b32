"""Prompt and answer lengths by their percentiles.

Production lengths fit no simple law, and prompt and answer are nearly uncorrelated (-0.11 to 0.07
in the traces the tables come from), so each is drawn from its own percentiles.
"""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files

import msgspec

from nitsum.errors import ConfigError


class Quantiles(msgspec.Struct, frozen=True):
    """A distribution by evenly spaced quantiles, the least and the largest value included."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or list(self.values) != sorted(self.values) or self.values[0] < 0:
            raise ConfigError("Quantiles need at least two values, none negative, never falling.")

    def at(self, share: float) -> float:
        """The value below which `share` (0..1) of the draws lie."""
        place = share * (len(self.values) - 1)
        i = min(int(place), len(self.values) - 2)
        low, high = self.values[i], self.values[i + 1]
        return low + (high - low) * (place - i)

    def draw(self, rng: random.Random) -> int:
        """A count, at least 1."""
        return max(1, round(self.at(rng.random())))

    @property
    def mean(self) -> float:
        inner = sum(self.values[1:-1]) + (self.values[0] + self.values[-1]) / 2
        return inner / (len(self.values) - 1)

    def scaled(self, factor: float) -> Quantiles:
        return Quantiles(tuple(value * factor for value in self.values))


class Lengths(msgspec.Struct, frozen=True):
    """Tokens of prompts and of answers."""

    prompt: Quantiles
    output: Quantiles

    def scaled(self, factor: float) -> Lengths:
        return Lengths(self.prompt.scaled(factor), self.output.scaled(factor))


class LengthTable(msgspec.Struct, frozen=True):
    """One entry of the packaged file: percentiles 0..100, with their source."""

    source: str
    licence: str
    num_requests: int
    prompt: tuple[float, ...]
    output: tuple[float, ...]
    rate_per_s: float | None = None
    """Mean arrivals of the trace; None where it has no times."""
    interarrival_cv: float | None = None

    @property
    def lengths(self) -> Lengths:
        return Lengths(Quantiles(self.prompt), Quantiles(self.output))


@cache
def length_tables() -> dict[str, LengthTable]:
    """The tables that come with the package, by name."""
    data = (files("nitsum.workload") / "data" / "lengths.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, LengthTable])


def lengths_named(name: str) -> Lengths:
    """A packaged table; raises `ConfigError` naming those that exist."""
    table = length_tables().get(name)
    if table is None:
        raise ConfigError(f"Unknown lengths {name!r}. Known: {', '.join(length_tables())}.")
    return table.lengths
