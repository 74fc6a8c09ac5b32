"""`nitsum simulate`: the real engine on a virtual clock, on a machine you need not have.

    nitsum simulate --model Llama-3.1-70B --machine 8xA100-80GB --plan TP8 \\
        --trace synthetic:azure_conversation --rate 4 --tiers priority=1,default=3
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from nitsum.bench.canary import take_canaries
from nitsum.bench.provenance import summary
from nitsum.cli.simulate_settings import SimulateSettings, build_site, build_systems, read_switches
from nitsum.cli.sources import add_flags, settings_or_error
from nitsum.cli.twin import NO_STEPS, pair_table, step_table
from nitsum.cost.adjust import adjusted
from nitsum.cost.table import load_table, save_table
from nitsum.errors import ConfigError
from nitsum.metrics.eventfile import EventFile, read_events
from nitsum.metrics.figures import figures
from nitsum.metrics.html import save_html
from nitsum.metrics.records import Recorder
from nitsum.metrics.tables import print_report
from nitsum.metrics.targets import Targets, load_targets, save_targets
from nitsum.sim.page import save_page
from nitsum.sim.replay import compare, items_of, pair_figures, step_pairs, step_points
from nitsum.sim.run import Options, SimResult, simulate
from nitsum.sim.run import Progress as OnProgress
from nitsum.sim.source import read_source
from nitsum.sim.sweep import Point, line_of, sweep, word
from nitsum.sim.sweep import figures as sweep_figures
from nitsum.sim.system import System
from nitsum.workload.generate import generate
from nitsum.workload.items import WorkItem
from nitsum.workload.spec import MixSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, SimulateSettings, config=False)


def run(args: argparse.Namespace) -> int:
    """Simulate one system, or several under one or more loads; print what came of it."""
    settings = settings_or_error(SimulateSettings, args, os.environ)
    targets = load_targets(Path(settings.targets)) if settings.targets else None
    site, targets = build_site(settings, targets)
    systems = build_systems(settings, site)
    if settings.compare:
        return _run_twin(settings, systems, targets)
    if settings.save_cost:
        raise ConfigError("--save-cost goes with --compare: it needs steps that were served.")
    assert targets is not None  # only a twin may have none
    if settings.save_targets:
        save_targets(targets, Path(settings.save_targets))
    if settings.sweep or len(systems) > 1:
        return _run_many(settings, systems, targets)
    return _run_one(settings, systems[0], targets)


def _mix(settings: SimulateSettings) -> MixSpec:
    return read_source(
        settings.trace,
        rate_per_s=settings.rate,
        duration_s=settings.duration,
        seed=settings.seed,
        tiers=dict(settings.tiers),
        max_total_tokens=settings.max_model_len,
    )


def _options(settings: SimulateSettings) -> Options:
    return Options(
        host_latency_s=settings.host_latency,
        front_door_s=settings.front_door,
        noise=settings.noise,
        seed=settings.seed,
        drain_s=settings.drain,
        switches=read_switches(settings.switch_at),
    )


# --- one system ----------------------------------------------------------------------------------


def _run_one(settings: SimulateSettings, system: System, targets: Targets) -> int:
    _report(settings, _simulated(settings, system, generate(_mix(settings)), targets), targets)
    return 0


def _run_twin(settings: SimulateSettings, systems: list[System], targets: Targets | None) -> int:
    """The arrivals of a served run again, and how far the two lie apart."""
    if settings.sweep or len(systems) > 1 or settings.save_targets:
        raise ConfigError(
            "--compare goes with a single run; leave out --sweep, --against, --baselines and "
            "--save-targets."
        )
    served = Recorder(read_events(Path(settings.compare)))
    if settings.save_cost:
        _save_adjusted(settings, served)
    result = _simulated(settings, systems[0], items_of(served), targets)
    take_canaries(served)
    canaries = take_canaries(result.recorder)
    pairs = compare(served, result.recorder, targets=targets, warmup_s=settings.warmup)
    if not pairs:
        raise ConfigError("No request was answered both times after the warm-up.")
    _report(settings, result, targets, pair_figures(pairs), canaries)
    if not settings.json:
        console = Console(highlight=False, soft_wrap=True)
        console.print(pair_table(pairs))
        steps = step_pairs(served, result.system.cost)
        console.print(step_table(steps) if steps else NO_STEPS)
    return 0


def _save_adjusted(settings: SimulateSettings, served: Recorder) -> None:
    """The table that was simulated with, as the engine's steps say it should be."""
    if not settings.cost:
        raise ConfigError("--save-cost scales a measured table: give it with --cost.")
    points = list(step_points(served))
    if not points:
        raise ConfigError(f"--save-cost: {NO_STEPS}")
    table, scales = adjusted(load_table(Path(settings.cost)), points)
    words = "; ".join(
        f"TP{degree} decodes x{scale.decode:.3f}, prompts x{scale.prompt:.3f}"
        for degree, scale in scales.items()
    )
    note = f"Scaled to {len(points)} served steps: {words}."
    notes = " ".join(filter(None, (table.provenance.notes, note)))
    provenance = msgspec.structs.replace(table.provenance, notes=notes)
    save_table(msgspec.structs.replace(table, provenance=provenance), Path(settings.save_cost))
    print(note, file=sys.stderr)


def _simulated(
    settings: SimulateSettings, system: System, items: Iterable[WorkItem], targets: Targets | None
) -> SimResult:
    sink = EventFile(Path(settings.events)) if settings.events else None
    with _progress(system.name) as on_progress:
        result = simulate(
            system,
            items,
            targets=targets,
            options=_options(settings),
            sink=sink,
            progress=on_progress,
        )
    if sink is not None:
        sink.close()
    return result


def _report(
    settings: SimulateSettings,
    result: SimResult,
    targets: Targets | None,
    more: dict[str, float] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """The figures of a run; `more` figures and `notes` are known of it by other means."""
    report = result.report(targets, warmup_s=settings.warmup, small_samples=settings.small_samples)
    report = msgspec.structs.replace(report, notes=[*report.notes, *notes])
    if settings.html:
        title = f"Simulated: {settings.model} on {settings.machine}, {result.system.name}"
        save_html(report, result.recorder, Path(settings.html), title=title, targets=targets)
    if settings.json:
        found = {**figures(report, "sim_"), **run_figures(result), **(more or {})}
        _print_json(summary(found, _notes(settings, result.system, targets)))
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(_system_line(result.system))
    print_report(report, console)
    console.print(_usage_line(result))


def run_figures(result: SimResult) -> dict[str, float]:
    """What only a simulation knows, by name."""
    return {
        "sim_arena_mean_share": result.arena_mean_share,
        "sim_arena_max_share": result.arena_max_share,
        "sim_busy_share": sum(result.busy_share) / len(result.busy_share),
        "sim_num_unfinished": float(result.num_unfinished),
        "sim_speedup": result.speedup,
    }


def _system_line(system: System) -> str:
    arena, config = system.arena, system.config
    gib = arena.num_units * arena.unit_bytes / (1 << 30)
    return (
        f"{system.name}: plans {', '.join(plan.name for plan in config.plans.plans)}; policy "
        f"{config.policy}; each rank holds 1/{config.min_tp} of the weights and {gib:.1f} GiB of KV"
    )


def _usage_line(result: SimResult) -> str:
    busy = " ".join(f"{share:.0%}" for share in result.busy_share)
    return (
        f"arena in use: mean {result.arena_mean_share:.0%}, most {result.arena_max_share:.0%}; "
        f"busy by rank (waiting left out): {busy}\n"
        f"simulated {result.sim_s:.0f} s in {result.cpu_s:.1f} s of one core: "
        f"{result.speedup:.0f}x real time"
    )


# --- several systems, several loads --------------------------------------------------------------


def _run_many(settings: SimulateSettings, systems: list[System], targets: Targets) -> int:
    if settings.events:
        raise ConfigError("--events goes with a single run; leave out --sweep and --against.")
    console = Console(stderr=settings.json, highlight=False, soft_wrap=True)
    points = sweep(
        systems,
        _mix(settings),
        settings.sweep or (1.0,),
        targets,
        options=_options(settings),
        warmup_s=settings.warmup,
        small_samples=settings.small_samples,
        note=console.print,
    )
    if settings.html:
        title = f"Simulated: {settings.model} on {settings.machine}, {settings.trace}"
        save_page(points, Path(settings.html), title)
    if settings.json:
        _print_json(summary(_many_figures(points), _notes(settings, systems[0], targets)))
    else:
        console.print(_ranking(points))
    return 0


def _many_figures(points: list[Point]) -> dict[str, float]:
    """Every point's figures, and the ratios of the first system over the others."""
    found: dict[str, float] = {}
    for point in points:
        found.update(figures(point.report, word(f"{point.system} at {point.load:g} ")))
    ours, *theirs = dict.fromkeys(point.system for point in points)
    return found | sweep_figures(points, ours, theirs)


def _ranking(points: list[Point]) -> str:
    best = sorted(points, key=lambda p: p.report.goodput_per_s or 0.0, reverse=True)
    return "\nBy goodput:\n" + "\n".join(line_of(point) for point in best)


def _notes(settings: SimulateSettings, system: System, targets: Targets | None) -> str:
    return (
        f"Simulated, not served: {settings.model} on {settings.machine}; {_system_line(system)}; "
        f"{_workload_words(settings)}; "
        f"targets: {targets.source if targets else 'those of the served requests'}"
    )


def _workload_words(settings: SimulateSettings) -> str:
    if settings.compare:
        return f"arrivals of {Path(settings.compare).name}"
    return f"workload {settings.trace} x {settings.rate:g}, seed {settings.seed}"


def _print_json(content: dict[str, object]) -> None:
    print(msgspec.json.format(msgspec.json.encode(content), indent=1).decode())


@contextmanager
def _progress(title: str) -> Iterator[OnProgress | None]:
    """A line on the terminal that says how far the virtual clock is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title)

        def on_progress(at_s: float, num_requests: int) -> None:
            text = f"{title}: {at_s:.0f} s simulated, {num_requests} requests under way"
            bar.update(task, description=text)

        yield on_progress
