"""What a simulation serves, from a few words: a trace, lengths at a rate, or a mix."""

from __future__ import annotations

from pathlib import Path

from nitsum.errors import ConfigError
from nitsum.workload.spec import MixSpec, StreamSpec, check_mix, load_mix, scaled

SYNTHETIC = "synthetic:"
MIX = "mix:"


def read_source(
    text: str,
    *,
    rate_per_s: float = 1.0,
    duration_s: float = 0.0,
    seed: int = 0,
    tiers: dict[str, float] | None = None,
    max_total_tokens: int = 0,
) -> MixSpec:
    """A mix from `synthetic:LENGTHS`, `mix:NAME_OR_FILE` or the name of a trace's file.

    `rate_per_s` is the rate of synthetic arrivals and multiplies that of mixes and traces;
    `duration_s` 0 takes the mix's own, or 600 s. Raises `ConfigError` saying what is wrong.
    """
    if text.startswith(MIX):
        if tiers:
            raise ConfigError(f"{text} names the tiers of its streams: leave --tiers out.")
        spec = load_mix(text.removeprefix(MIX))
        duration_s = duration_s or spec.duration_s
    else:
        duration_s = duration_s or 600.0
        spec = MixSpec(name=text, duration_s=duration_s, streams=(_stream(text, tiers),))
    return _checked(scaled(spec, rate_per_s), duration_s, seed, max_total_tokens)


def _stream(text: str, tiers: dict[str, float] | None) -> StreamSpec:
    weights = tiers or {"default": 1.0}
    if text.startswith(SYNTHETIC):
        lengths = text.removeprefix(SYNTHETIC)
        return StreamSpec(name="requests", rate_per_s=1.0, lengths=lengths, tiers=weights)
    if not Path(text).is_file():
        raise ConfigError(
            f"No trace {text!r}: give a .csv or .jsonl file, synthetic:LENGTHS or mix:NAME."
        )
    return StreamSpec(name="requests", trace=text, tiers=weights)


def _checked(spec: MixSpec, duration_s: float, seed: int, max_total_tokens: int) -> MixSpec:
    """The mix cut to `duration_s`: phases that would start later are left out."""
    spec = MixSpec(
        name=spec.name,
        duration_s=duration_s,
        streams=spec.streams,
        seed=seed or spec.seed,
        phases=tuple(phase for phase in spec.phases if phase.at_s < duration_s),
        max_total_tokens=max_total_tokens or spec.max_total_tokens,
    )
    check_mix(spec, spec.name)
    return spec
