"""What `nitsum simulate` can be told, and the systems that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from nitsum.cli.readers import (
    boolean,
    entries,
    number,
    one_of,
    seconds,
    size_bytes,
    text,
    weights,
    whole_number,
)
from nitsum.cli.settings import StepSizes, by_device
from nitsum.cli.sources import setting
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.cost.shipped import chosen_cost
from nitsum.errors import ConfigError
from nitsum.limits import DTYPES
from nitsum.metrics.targets import Targets, held_to
from nitsum.plan import PlanSet, read_plans
from nitsum.sim.run import PlannedSwitch
from nitsum.sim.system import (
    Site,
    System,
    baselines,
    build_system,
    our_system,
    site_targets,
    static_system,
    uniform_plan,
)


def numbers(value: object) -> tuple[float, ...]:
    """Numbers above 0, comma-separated or as a list."""
    return tuple(number(entry) for entry in entries(value))


@dataclass(frozen=True, kw_only=True)
class SimulateSettings(StepSizes):
    """Model and machine, what is served how, what arrives, and what to write."""

    model: str = setting(
        text,
        "",
        "a known shape such as Llama-3.1-70B, demo, a checkpoint folder or its config.json",
    )
    machine: str = setting(text, "8xA100-80GB", "GPUs, such as 8xA100-80GB or 4xCPU")
    plan: str = setting(text, "", "the plan to begin with; alone: the only one (a static layout)")
    plans: tuple[object, ...] = setting(
        entries, (), "plans to hold ready: a YAML file or shorthand", "FILE|PLAN,..."
    )
    policy: Literal["fcfs", "priority", "nitsum"] = setting(
        one_of(
            "fcfs",
            "priority",
            "nitsum",
            elsewhere={"static": "--no-control", "adaptive": "--control"},
        ),
        "nitsum",
        "fcfs, priority or nitsum",
    )
    against: tuple[object, ...] = setting(
        entries, (), "also simulate these on the same arrivals, e.g. TP8:fcfs", "PLAN:POLICY,..."
    )
    baselines: bool = setting(
        boolean, False, "also simulate every static layout and policy, splits and a threshold"
    )
    min_tp: int = setting(
        whole_number(0), 0, "each rank holds 1/N of the weights (default: as little as may be)", "N"
    )
    control: bool = setting(
        boolean, True, "with several plans and no --switch-at, let the controller choose"
    )
    switch_at: str = setting(text, "", "switch by hand, e.g. 60:TP8,120:4xTP2", "SECONDS:PLAN,...")
    trace: str = setting(
        text,
        "synthetic:azure_conversation",
        "what arrives: a .csv or .jsonl trace, synthetic:LENGTHS or mix:NAME|FILE",
        "FILE|synthetic:...|mix:...",
    )
    rate: float = setting(
        number, 1.0, "requests/s of synthetic arrivals; multiplies the rate of traces and mixes"
    )
    duration: float = setting(
        seconds, 0.0, "seconds of arrivals (default: the mix's own, or 600)", "SECONDS"
    )
    seed: int = setting(whole_number(), 0, "of arrivals, lengths and noise", "N")
    tiers: tuple[tuple[str, float], ...] = setting(
        weights, (), "weights of tiers, where the mix names none: priority=1,default=3 or a file"
    )
    targets: str = setting(
        text, "", "targets to judge by (default: the rule of k lone prefills)", "FILE"
    )
    save_targets: str = setting(text, "", "write the targets that were used", "FILE")
    sweep: tuple[float, ...] = setting(
        numbers, (), "simulate at several multiples of the rate, e.g. 0.5,1,2", "LOADS"
    )
    max_mixed_tokens: int = setting(
        whole_number(),
        0,
        f"tokens of a step that has decodes (default: {by_device('max_mixed_tokens')}; "
        "max-batch-tokens if that is given)",
        "N",
    )
    max_model_len: int = setting(
        whole_number(), 0, "longest prompt plus answer, tokens (default: the model's)", "N"
    )
    prefix_cache: bool = setting(boolean, True, "keep the KV of prompts for later requests")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        one_of("auto", "float32", "bfloat16"),
        "auto",
        "float32 or bfloat16 (default: float32 on CPUs, bfloat16 on GPUs)",
    )
    kv_memory: int = setting(
        size_bytes, 0, "KV arena of one rank (default: what weights and buffers leave)", "SIZE"
    )
    host_kv_memory: int = setting(
        size_bytes, 0, "host memory of one rank for KV of displaced requests", "SIZE"
    )
    cost: str = setting(
        text,
        "",
        "a measured cost table, or `analytic` (default: the table that comes with Nitsum for this "
        "machine and shape; without one, analytic)",
        "FILE",
    )
    host_latency: float = setting(
        seconds, 0.0002, "from a step's end to its tokens in the engine, seconds", "SECONDS"
    )
    front_door: float = setting(
        seconds, 0.0, "from a request's arrival to the engine, seconds", "SECONDS"
    )
    noise: float = setting(seconds, 0.0, "steps last up to this share more or less", "SHARE")
    warmup: float = setting(seconds, 0.0, "arrivals of the first seconds are not judged", "SECONDS")
    drain: float = setting(
        seconds, 600.0, "longest time after the last arrival; what is left is missed", "SECONDS"
    )
    small_samples: bool = setting(boolean, False, "give a P99 from fewer than 1,000 samples")
    json: bool = setting(boolean, False, "print figures as JSON, as a result's summary.json")
    html: str = setting(text, "", "write a report as one HTML page", "FILE")
    events: str = setting(text, "", "write every event, one JSON object a line", "FILE")
    compare: str = setting(
        text, "", "events of a served run: simulate its arrivals, print the errors", "FILE"
    )
    save_cost: str = setting(
        text, "", "with --compare: write the --cost table scaled to the steps served", "FILE"
    )


# --- from settings to systems --------------------------------------------------------------------


def build_site(settings: SimulateSettings, targets: Targets | None) -> tuple[Site, Targets | None]:
    """What all systems share, and what requests are held to.

    The twin of a served run without targets has none either: both keep to the tiers' own.
    """
    if not settings.model:
        raise ConfigError("--model: name a shape such as Llama-3.1-70B, or a checkpoint folder.")
    shape, machine = shape_named(settings.model), Machine.parse(settings.machine)
    dtype = DTYPES[machine.device] if settings.dtype == "auto" else settings.dtype
    site = Site(
        model=settings.model,
        shape=shape,
        machine=machine,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        max_mixed_tokens=settings.max_mixed_tokens,
        max_model_len=settings.max_model_len,
        block_tokens=settings.block_tokens,
        prefix_cache=settings.prefix_cache,
        dtype=dtype,
        kv_bytes=settings.kv_memory,
        host_kv_bytes=settings.host_kv_memory,
        cost=chosen_cost(settings.cost, shape, machine, dtype),
    )
    if targets is None and settings.compare:
        return site, None
    targets = targets or site_targets(site)
    return replace(site, tiers=held_to(site.tiers, targets)), targets


def build_systems(settings: SimulateSettings, site: Site) -> list[System]:
    """The system that was asked for, then those it is compared with."""
    systems = [_asked(settings, site)]
    systems += [_other(site, str(entry)) for entry in settings.against]
    if settings.baselines:
        names = {system.name for system in systems}
        systems += [system for system in baselines(site) if system.name not in names]
    return systems


def _other(site: Site, entry: str) -> System:
    name, colon, policy = entry.partition(":")
    if not colon or policy not in ("fcfs", "priority", "nitsum"):
        raise ConfigError(f"--against: cannot read {entry!r}. Write PLAN:POLICY, e.g. TP8:fcfs.")
    return static_system(site, _plans(site, (name,), "")[name], policy)


def _asked(settings: SimulateSettings, site: Site) -> System:
    if settings.plans:
        plans = _plans(site, settings.plans, settings.plan)
        system = build_system(site, "ours", plans, settings.policy, min_tp=settings.min_tp or None)
        steers = settings.control and not settings.switch_at and len(plans.plans) > 1
        return replace(system, steers=steers)
    if settings.switch_at and not settings.plan:
        return our_system(site, min_tp=settings.min_tp or None)
    widest = uniform_plan(site.num_ranks, site.num_ranks).name
    name = settings.plan or widest
    plan = _plans(site, (name,), "")[name]
    if not settings.min_tp:
        return static_system(site, plan, settings.policy)
    plans = PlanSet(site.num_ranks, (plan,), plan.name)
    label = f"{plan.name} {settings.policy}"
    return build_system(site, label, plans, settings.policy, min_tp=settings.min_tp)


def _plans(site: Site, named: tuple[object, ...], initial: str) -> PlanSet:
    return read_plans(list(named), site.num_ranks, initial or None)


def read_switches(words: str) -> tuple[PlannedSwitch, ...]:
    """`60:TP8,120:4xTP2` as switches; raises `ConfigError`."""
    return tuple(_read_switch(entry) for entry in words.split(",") if entry.strip())


def _read_switch(entry: str) -> PlannedSwitch:
    at, colon, plan = entry.strip().partition(":")
    reads: Callable[[object], float] = seconds
    try:
        if colon and plan:
            return PlannedSwitch(reads(at), plan)
    except ValueError:
        pass
    raise ConfigError(f"--switch-at: cannot read {entry!r}. Write SECONDS:PLAN, e.g. 60:TP8.")
