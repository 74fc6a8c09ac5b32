"""`nitsum profile MODEL -o cost.json`: measure this machine's steps into a cost table."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nitsum.bench.profile import (
    OnPoint,
    Partial,
    Profiler,
    grid_for,
    measure_points,
    shapes_of,
    table_of,
)
from nitsum.cli.build import build_model_config
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.progress import note
from nitsum.cli.readers import text
from nitsum.cli.settings import ModelSettings
from nitsum.cli.sources import add_flags, setting, settings_or_error
from nitsum.config import EngineConfig
from nitsum.cost.fit import print_fit
from nitsum.cost.table import save_table
from nitsum.engine.launch import max_model_len
from nitsum.engine.process import arena_of
from nitsum.engine.process_executor import ProcessExecutor
from nitsum.errors import ConfigError, require_torch
from nitsum.plan import Group
from nitsum.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(ModelSettings):
    """What is measured, as it will be served."""

    out: str = setting(text, "cost.json", "where the table goes", "FILE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ProfileSettings, config=False)
    parser.add_argument("-o", dest="out", metavar="FILE", default=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Measure, fit, print the error of the fit, write the table."""
    require_torch()
    settings = settings_or_error(ProfileSettings, args, os.environ)
    if not settings.model:
        raise ConfigError("Name a model: a checkpoint folder, a .gguf file, or `demo`.")
    model = checkpoint_folder(settings.model)
    shape = ModelShape.from_folder(model)
    config = build_model_config(settings, model)
    partial = Partial(Path(f"{settings.out}.partial"))
    started_s = time.monotonic()
    executor = ProcessExecutor(config, shape, on_progress=note)
    try:
        arena = arena_of(config, shape, executor.start())
        longest = max_model_len(config, shape)
        profiler = Profiler(executor, arena, longest)
        shapes = shapes_of(
            grid_for(config, longest), config.plans.degrees, profiler.room, config.block_tokens
        )
        with _bar() as on_point:
            points = measure_points(profiler, shapes, partial, on_point)
        moves = profiler.measure_moves()
        notes = _switch_notes(profiler, config)
    finally:
        executor.close()
    table = table_of(points, moves, settings.model, notes)
    save_table(table, Path(settings.out))
    partial.path.unlink(missing_ok=True)
    print(f"{len(points)} steps in {time.monotonic() - started_s:.0f} s. Error of the fit:")
    print_fit(table)
    print(
        f"KV copies: {table.move.launch_s * 1e3:.2f} ms + {table.move.bytes_per_s / 1e9:.1f} GB/s"
    )
    print(f"{notes}\nWrote {settings.out}.")
    return 0


def _switch_notes(profiler: Profiler, config: EngineConfig) -> str:
    """How long a sequence is between two lanes, for each pair of neighbouring degrees."""
    degrees = config.plans.degrees
    pairs = [
        (Group(a, 0), Group(b, 0))
        for low, high in pairwise(degrees)
        for a, b in ((low, high), (high, low))
    ]
    words: list[str] = []
    for src, dst in pairs:
        times = sorted(profiler.measure_cut_over(src, dst) for _ in range(3))
        words.append(f"TP{src.degree} to TP{dst.degree} {times[1] * 1e3:.1f} ms")
    return f"From a lane's last step to the next lane's first one: {', '.join(words) or 'none'}."


@contextmanager
def _bar() -> Iterator[OnPoint]:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("starting", total=None)

        def on_point(done: int, total: int, word: str) -> None:
            progress.update(task, completed=done, total=total, description=word)

        yield on_point
