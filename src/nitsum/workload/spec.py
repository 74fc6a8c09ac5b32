"""A workload as a checked file: streams of requests, phases that change their rates.

name: flip
duration_s: 600
seed: 7
streams:
  - name: chat
    rate_per_s: 4
    lengths: azure_conversation
    tiers: {priority: 1, default: 3}
    tenants: {acme: 2, zeta: 1}
  - name: agents
    rate_per_s: 0.5
    lengths: azure_code
    chain: {calls: [5, 10], think_s: 1.0, deadline_s: 90}
phases:
  - {name: calm, at_s: 0}
  - {name: burst, at_s: 300, rates: {chat: 4}}
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec
import yaml

from nitsum.errors import ConfigError
from nitsum.workload.lengths import Lengths, Quantiles, length_tables, lengths_named


class LengthsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Lengths written out as quantiles (two values: uniform between them)."""

    prompt: tuple[float, ...]
    output: tuple[float, ...]


class ChainSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Agent chains: each arrival of the stream starts one."""

    calls: tuple[int, int] = (5, 10)
    """Least and most calls of a chain."""
    new_tokens: tuple[int, int] = (64, 512)
    """Least and most prompt tokens a later call adds."""
    think_s: float = 1.0
    """Mean time between an answer and the next call (exponential); 0 is none."""
    deadline_s: float | None = None
    """For the whole chain, from its first arrival."""


def _only_default() -> dict[str, float]:
    return {"default": 1.0}


class StreamSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests of one kind: synthetic (`lengths` and `rate_per_s`) or replayed (`trace`)."""

    name: str
    rate_per_s: float | None = None
    """Mean arrivals of a synthetic stream (of chains, if it has them)."""
    cv: float = 1.0
    """Coefficient of variation of each client's gaps; 1 is Poisson, more is bursty."""
    clients: int = 1
    skew: float = 0.0
    """How unequal the clients are: the i-th sends in proportion to 1 / i^skew."""
    lengths: str | LengthsSpec | None = None
    """A packaged table by name, or quantiles."""
    length_scale: float = 1.0
    """Multiplies all lengths, to fit a small model."""
    trace: str | None = None
    """Path of a trace, relative to the file of this mix."""
    speed: float = 1.0
    """Replays a trace this many times as fast."""
    start_s: float = 0.0
    """Where in the trace the replay starts."""
    tiers: dict[str, float] = msgspec.field(default_factory=_only_default)
    """Weights."""
    tenants: dict[str, float] = {}
    """Weights; empty: each client is a tenant of its own."""
    shared_prefix_tokens: int = 0
    """System prompt shared by all requests of a tenant, part of the prompt's length."""
    chain: ChainSpec | None = None


class PhaseSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From `at_s` on, the named streams' rates are multiplied; the others' are as written."""

    name: str
    at_s: float
    rates: dict[str, float] = {}


class MixSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole workload; everything random follows from `seed`."""

    name: str
    duration_s: float
    streams: tuple[StreamSpec, ...]
    seed: int = 0
    phases: tuple[PhaseSpec, ...] = ()
    max_total_tokens: int = 0
    """Longest prompt plus answer; longer ones are cut and chains end early. 0: no limit."""


def load_mix(source: str | Path) -> MixSpec:
    """A packaged mix by name, or a YAML or JSON file; raises `ConfigError`."""
    path = Path(source)
    packaged = files("nitsum.workload") / "mixes" / f"{source}.yaml"
    if not path.exists() and packaged.is_file():
        return read_mix(yaml.safe_load(packaged.read_text()), where=f"mix {source}")
    if not path.is_file():
        raise ConfigError(f"No mix {str(source)!r}: no such file. Packaged: {_packaged_names()}.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is neither YAML nor JSON: {error}.") from error
    return _with_paths(read_mix(content, where=str(path)), path.parent)


def _packaged_names() -> str:
    folder = files("nitsum.workload") / "mixes"
    return ", ".join(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir()))


def _with_paths(spec: MixSpec, folder: Path) -> MixSpec:
    """Traces are found relative to the mix that names them."""
    streams = tuple(
        msgspec.structs.replace(s, trace=str(folder / s.trace)) if s.trace else s
        for s in spec.streams
    )
    return msgspec.structs.replace(spec, streams=streams)


def read_mix(content: object, where: str = "mix") -> MixSpec:
    """A mix from parsed YAML or JSON, checked; raises `ConfigError` saying which field is wrong."""
    try:
        spec = msgspec.convert(content, MixSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.") from error
    check_mix(spec, where)
    return spec


def check_mix(spec: MixSpec, where: str = "mix") -> None:
    """Raises `ConfigError` for a mix that could not be generated."""
    names = [stream.name for stream in spec.streams]
    _require(spec.duration_s > 0, where, "duration_s must be positive")
    _require(spec.max_total_tokens != 1, where, "max_total_tokens is 0 or at least 2")
    _require(bool(names), where, "it has no streams")
    _require(len(set(names)) == len(names), where, "stream names must be unique")
    for stream in spec.streams:
        _check_stream(stream, f"{where}: stream {stream.name!r}")
    times = [phase.at_s for phase in spec.phases]
    _require(times == sorted(set(times)) and min(times, default=0) >= 0, where, "phases must rise")
    for phase in spec.phases:
        _check_phase(phase, spec, f"{where}: phase {phase.name!r}")


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise ConfigError(f"{where}: {what}.")


def _check_stream(stream: StreamSpec, where: str) -> None:
    if stream.trace is None:
        known = stream.lengths is not None and stream.rate_per_s is not None
        _require(known, where, "give lengths and rate_per_s, or trace")
        _require((stream.rate_per_s or 0) > 0, where, "rate_per_s must be positive")
        lengths_of(stream, where)
    else:
        alone = stream.lengths is None and stream.rate_per_s is None and stream.chain is None
        _require(alone, where, "a trace brings its own lengths, rate and calls")
    _require(stream.cv >= 0 and stream.clients >= 1, where, "cv or clients is too small")
    _require(stream.speed > 0 and stream.length_scale > 0, where, "speed and scale are positive")
    _require(bool(stream.tiers), where, "give at least one tier")
    for weights in (stream.tiers, stream.tenants):
        fine = not weights or (min(weights.values()) >= 0 and sum(weights.values()) > 0)
        _require(fine, where, "weights must not be negative and not all zero")
    if stream.chain is not None:
        _check_chain(stream.chain, where)


def _check_chain(chain: ChainSpec, where: str) -> None:
    for low, high in (chain.calls, chain.new_tokens):
        _require(1 <= low <= high, where, "calls and new_tokens are [least, most], from 1 on")
    _require(chain.think_s >= 0, where, "think_s must not be negative")


def _check_phase(phase: PhaseSpec, spec: MixSpec, where: str) -> None:
    synthetic = {stream.name for stream in spec.streams if stream.trace is None}
    unknown = set(phase.rates) - synthetic
    _require(not unknown, where, f"no synthetic stream is called {', '.join(sorted(unknown))}")
    _require(min(phase.rates.values(), default=0) >= 0, where, "rates must not be negative")
    _require(phase.at_s < spec.duration_s, where, "it starts after the end")


def lengths_of(stream: StreamSpec, where: str = "stream") -> Lengths:
    """The lengths of a synthetic stream, scaled."""
    spec = stream.lengths
    if isinstance(spec, LengthsSpec):
        return Lengths(Quantiles(spec.prompt), Quantiles(spec.output)).scaled(stream.length_scale)
    _require(spec in length_tables(), where, f"lengths is one of {', '.join(length_tables())}")
    return lengths_named(spec or "").scaled(stream.length_scale)


def scaled(spec: MixSpec, factor: float) -> MixSpec:
    """The same mix at `factor` times the rate; traces replay faster."""
    if factor <= 0:
        raise ConfigError("A rate can only be scaled by a positive factor.")
    streams = tuple(
        msgspec.structs.replace(
            stream,
            rate_per_s=None if stream.rate_per_s is None else stream.rate_per_s * factor,
            speed=stream.speed * factor if stream.trace else stream.speed,
        )
        for stream in spec.streams
    )
    return msgspec.structs.replace(spec, streams=streams)
