"""What is served and when: sides, points, and the file that holds them between two machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.goodput.basis import Basis, digest
from nitsum.config import Policy
from nitsum.errors import ConfigError
from nitsum.limits import StepLimits
from nitsum.messages import Device
from nitsum.plan import read_plans
from nitsum.workload.spec import MixSpec, scaled

SATURATED = 1.5
"""Times saturation: a load that no layout can serve."""
START_S = 25.0
"""A server's start and end on GPUs, 8B with random weights."""
CLIENT_S = 3.0
"""A client's start, and what it writes."""

Mixes = Literal["mixed", "shifting", "alone"]
"""`alone`: the priority streams of `mixed`, at the same times."""


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """A server: what it holds ready, and how it decides."""

    plans: list[str]
    policy: Policy
    adaptive: bool = False

    @property
    def name(self) -> str:
        return "ours" if self.adaptive else f"{self.plans[0]} {self.policy}"

    def min_tp(self, num_ranks: int) -> int:
        """A static layout keeps its own shard of the weights and no more."""
        return read_plans(list(self.plans), num_ranks).degrees[0]

    def flags(self, num_ranks: int, limits: StepLimits) -> list[str]:
        """Of `nitsum serve`."""
        return [
            "--ranks", str(num_ranks), "--plans", ",".join(self.plans),
            "--min-tp", str(self.min_tp(num_ranks)), "--policy", self.policy,
            "--controller", "adaptive" if self.adaptive else "static",
            "--block-tokens", str(limits.block_tokens),
            "--max-num-seqs", str(limits.max_num_seqs),
            "--max-batch-tokens", str(limits.max_batch_tokens),
            "--max-mixed-tokens", str(limits.max_mixed_tokens),
        ]  # fmt: skip


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One side under one load."""

    name: str
    """`SIDE_LOAD`, as figures are called."""
    side: Side
    mix: Mixes
    load: float
    """Requests per second of the whole mix, times those of the file (one)."""
    simulated: dict[str, float]
    """Figures of the same run in the simulator."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated side under one load."""

    side: str
    mix: Mixes
    load: float
    figures: dict[str, float]


class Points(msgspec.Struct, frozen=True, kw_only=True):
    """The file: what `foresee` found, and what is to be served because of it."""

    date: str
    command: str
    machine: str
    device: Device
    num_ranks: int
    basis: Basis
    """What servers must be given, too."""
    mixes: dict[Mixes, MixSpec]
    """At one request per second, lasting as long as a point."""
    warmup_s: float
    """Arrivals that load but are not judged."""
    drain_s: float
    """After the last arrival; what is not answered then counts as missed."""
    saturation_per_s: float
    """Requests per second that the fastest static layout answers when there are always more."""
    alone_capacity: float
    """The highest load whose priority requests, and nothing else, the widest layout serves."""
    points: list[Point]
    """The most telling first."""
    runs: list[Run]
    """All that was simulated to find them."""

    def mix(self, point: Point) -> MixSpec:
        return scaled(self.mixes[point.mix], point.load)

    def digest(self, point: Point) -> str:
        """Of all that a served run of the point depends on: its result is of no other point."""
        here = self.machine, self.device, self.num_ranks, self.basis
        return digest((*here, point.side, self.mix(point), self.warmup_s, self.drain_s))

    def check(self, point: Point, result: Mapping[str, Any], path: Path) -> None:
        """Raises `ConfigError` unless `result`, which `path` holds, is of exactly this point."""
        if result.get("point_sha256") != self.digest(point):
            raise ConfigError(
                f"{path} was not served for the point {point.name} of this file, but for one of "
                f"another plan (its load, model, step times, sizes or targets). Use another folder."
            )

    def seconds(self, point: Point) -> float:
        """Of device time, without the server's start."""
        return self.mixes[point.mix].duration_s + self.drain_s + CLIENT_S

    def chosen(self, names: list[str]) -> list[Point]:
        """The points named, in the file's order, or all; raises `ConfigError`."""
        known = [point.name for point in self.points]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ConfigError(f"No point {', '.join(unknown)}. There are: {', '.join(known)}.")
        return [point for point in self.points if not names or point.name in names]


def groups(points: list[Point]) -> list[list[Point]]:
    """By the server they share, which is started once for them."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.side.name, []).append(point)
    return list(found.values())


def device_s(file: Points, points: list[Point]) -> float:
    """What serving `points` takes in one go."""
    return len(groups(points)) * START_S + sum(map(file.seconds, points))


def only_priority(mix: MixSpec) -> MixSpec:
    """The streams whose requests are all of the priority tier, arriving when they did."""
    streams = tuple(stream for stream in mix.streams if set(stream.tiers) == {"priority"})
    if not streams:
        raise ConfigError(f"The mix {mix.name} has no stream of priority requests alone.")
    names = {stream.name for stream in streams}
    phases = tuple(
        msgspec.structs.replace(
            phase, rates={name: rate for name, rate in phase.rates.items() if name in names}
        )
        for phase in mix.phases
    )
    return msgspec.structs.replace(mix, streams=streams, phases=phases)


def save(content: msgspec.Struct, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def load_points(path: Path) -> Points:
    """Raises `ConfigError` saying what is wrong with the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Points)
    except OSError as error:
        raise ConfigError(f"Cannot read points {path}: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"Points {path}: {error}.") from error
