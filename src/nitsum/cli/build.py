"""From settings to what the engine takes: plans, tiers, `EngineConfig`."""

from __future__ import annotations

import dataclasses
import os
import ssl
from pathlib import Path
from typing import Any, cast, get_type_hints

import msgspec

from nitsum.cli.settings import ModelSettings, PlanSettings, ServeSettings
from nitsum.cli.sources import did_you_mean
from nitsum.config import EngineConfig
from nitsum.errors import ConfigError
from nitsum.ledger.records import Prices
from nitsum.ledger.store import Store
from nitsum.metrics.targets import held_to, load_targets
from nitsum.plan import PlanSet, default_plans, is_power_of_two, read_plans
from nitsum.server.keys import KeyRing
from nitsum.server.settings import ServerSettings
from nitsum.tier import DEFAULT_TIERS, Tier, TierSet


def build_plans(settings: PlanSettings) -> PlanSet:
    """The plans named, or the default ones that `min_tp` allows."""
    if not is_power_of_two(settings.ranks):
        raise ConfigError(f"--ranks: {settings.ranks} is not a power of two (1, 2, 4, 8, ...).")
    wanted = settings.min_tp or 1
    if not is_power_of_two(wanted) or wanted > settings.ranks:
        raise ConfigError(
            f"--min-tp: a power of two of at most --ranks ({settings.ranks}) is expected, not "
            f"{settings.min_tp}."
        )
    if settings.plans:
        return read_plans(list(settings.plans), settings.ranks, settings.plan or None)
    return _default_plans(settings)


def _default_plans(settings: PlanSettings) -> PlanSet:
    plans = tuple(
        plan
        for plan in default_plans(settings.ranks).plans
        if all(lane.degree >= settings.min_tp for lane in plan.lanes)
    )
    plan_set = PlanSet(settings.ranks, plans, settings.plan or plans[0].name)
    _ = plan_set[plan_set.initial]
    return plan_set


def build_model_config(settings: ModelSettings, model: Path) -> EngineConfig:
    """A configuration of workers for the checkpoint folder `model`, whatever they are to do."""
    limits, plans = settings.limits, build_plans(settings)
    return EngineConfig(
        model=str(model),
        plans=plans,
        device=settings.device,
        load_format=settings.load_format,
        dtype=settings.chosen_dtype,
        min_tp=settings.min_tp_of(plans),
        block_tokens=limits.block_tokens,
        kv_bytes=settings.kv_bytes,
        max_model_len=settings.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_batch_tokens=limits.max_batch_tokens,
        num_threads=settings.threads,
    )


def build_engine_config(settings: ServeSettings, model: Path) -> EngineConfig:
    """The engine's configuration for the checkpoint folder `model`."""
    return dataclasses.replace(
        build_model_config(settings, model),
        host_kv_bytes=settings.host_kv_memory,
        max_mixed_tokens=settings.max_mixed_tokens or settings.limits.max_mixed_tokens,
        tiers=tiers_of(settings),
        policy=settings.policy,
        prefix_cache=settings.prefix_cache,
        seed=settings.seed,
        timeout_s=settings.step_timeout,
        controller=settings.controller,
        cost=settings.cost,
        events_path=settings.events,
    )


def build_server_settings(
    settings: ServeSettings, model: Path, max_model_len: int
) -> ServerSettings:
    """The server's settings; `max_model_len` is what the engine says a request may have."""
    return ServerSettings.from_checkpoint(
        model,
        model_names=(settings.served_model_name,) if settings.served_model_name else (),
        max_model_len=max_model_len,
        host=settings.host,
        port=settings.port,
        api_key=settings.api_key or None,
        admin_key=settings.admin_key or None,
        tiers=tiers_of(settings),
        drain_s=settings.shutdown_timeout,
        patience_s=settings.client_timeout,
        stall_s=settings.stall_timeout,
        otlp=settings.otlp,
        tls_cert=Path(settings.tls_cert) if settings.tls_cert else None,
        tls_key=Path(settings.tls_key) if settings.tls_key else None,
        keys=Path(settings.keys) if settings.keys else None,
        data_dir=data_dir_of(settings),
        ledger=ledger_of(settings.ledger, data_dir_of(settings)),
        prices=Prices(settings.price_input, settings.price_output),
        batch_concurrency=settings.batch_concurrency,
        num_ranks=settings.ranks,
        device=settings.device,
    )


def default_data_dir() -> Path:
    """Where a server keeps what outlives it, unless it is told."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "nitsum"


def data_dir_of(settings: ServeSettings) -> Path:
    return Path(settings.data_dir) if settings.data_dir else default_data_dir()


def ledger_of(given: str, data_dir: Path) -> str:
    """The path or URL of the ledger; empty for none."""
    if given == "none":
        return ""
    return given or str(data_dir / "ledger.db")


def check_tls(settings: ServeSettings) -> None:
    """Raise what is wrong with the certificate, before a model is loaded for nothing."""
    if settings.tls_key and not settings.tls_cert:
        raise ConfigError("--tls-key needs its certificate: give --tls-cert, too.")
    if not settings.tls_cert:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except OSError as error:  # ssl's own errors are among them
        files = " and ".join(filter(None, (settings.tls_cert, settings.tls_key)))
        reason = error.strerror or error
        raise ConfigError(f"--tls-cert: {files} cannot be used ({reason}).") from None


def check_books(settings: ServeSettings) -> None:
    """Raise what is wrong with the key file or the ledger, before a model is loaded for nothing."""
    if settings.keys:
        KeyRing(Path(settings.keys), TierSet(tiers_of(settings)))
    if where := ledger_of(settings.ledger, data_dir_of(settings)):
        Store(where).close()


def tiers_of(settings: ServeSettings) -> tuple[Tier, ...]:
    """What is served: the tiers named, held to the file of targets if there is one."""
    tiers = build_tiers(settings.tiers)
    return held_to(tiers, load_targets(Path(settings.targets))) if settings.targets else tiers


def build_tiers(entries: tuple[object, ...]) -> tuple[Tier, ...]:
    """Tiers from YAML mappings whose keys are the fields of `Tier`; none given: the usual four."""
    if not entries:
        return DEFAULT_TIERS
    tiers = tuple(_read_tier(entry) for entry in entries)
    return TierSet(tiers).ordered


def _read_tier(entry: object) -> Tier:
    if not isinstance(entry, dict):
        raise ConfigError(f"--tiers: each entry is a mapping with at least `name`, not {entry!r}.")
    fields = get_type_hints(Tier)
    mapping = cast(dict[Any, object], entry)
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"--tiers: unknown key {key!r}.{did_you_mean(str(key), fields)}")
    required = {f.name for f in dataclasses.fields(Tier) if f.default is dataclasses.MISSING}
    missing = sorted(required - set(mapping))
    if missing:
        raise ConfigError(f"--tiers: {mapping.get('name', 'a tier')!r} lacks {', '.join(missing)}.")
    try:
        return msgspec.convert(mapping, Tier)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--tiers: {mapping['name']!r}: {error}.") from error
