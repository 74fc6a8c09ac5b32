"""`nitsum bench control`: does changing plans pay? In simulation, window by window."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nitsum.bench.provenance import summary
from nitsum.cli.readers import boolean, entries, text
from nitsum.cli.sources import add_flags, setting, settings_or_error
from nitsum.errors import ConfigError
from nitsum.sim.article import article_figures, article_points
from nitsum.sim.page import save_page as save_sweep
from nitsum.sim.study import Bench, StudyWindow, WindowResult, explained, figures, load_study
from nitsum.sim.study_page import save_page, table
from nitsum.sim.sweep import Point


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """Which study, and where its results go."""

    study: str = setting(text, "", "the study: model, plans and windows", "FILE", positional=True)
    data: str = setting(text, ".", "folder of the traces that the study names", "FOLDER")
    only: tuple[object, ...] = setting(entries, (), "only these windows", "NAME,...")
    article: bool = setting(boolean, True, "also the published setting, if the study has it")
    costs: bool = setting(boolean, True, "also run every window at each added switch cost")
    output: str = setting(text, "", "write summary.json, a page and decisions here", "FOLDER")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ControlSettings, config=False)


def run(args: argparse.Namespace) -> int:
    """Serve every window with every system, print the table, keep what was asked for."""
    settings = settings_or_error(ControlSettings, args, os.environ)
    if not settings.study:
        raise ConfigError("Name a study, such as benchmarks/workloads/control.yaml.")
    study = load_study(Path(settings.study), Path(settings.data))
    bench = Bench.of(study)
    results: list[WindowResult] = []
    points: list[Point] = []

    def say(line: str) -> None:
        print(line, flush=True)

    if study.article is not None and settings.article:
        say("the published setting:")
        points = article_points(bench, study.article, say)
    for window in _asked(study.windows, settings.only):
        say(f"{window.mix.name}:")
        result = bench.run(window, say, costs=settings.costs)
        results.append(result)
        if settings.output:
            _save(Path(settings.output), results, points, bench)
    say(table(results))
    for name, value in (article_figures(points) if points else {}).items():
        say(f"{name:<44}{value:>8.3f}")
    return 0


def _asked(windows: list[StudyWindow], names: tuple[object, ...]) -> list[StudyWindow]:
    known = [window.mix.name for window in windows]
    unknown = sorted({str(name) for name in names} - set(known))
    if unknown:
        raise ConfigError(f"--only: no window {', '.join(unknown)}. There are: {', '.join(known)}.")
    return [window for window in windows if not names or window.mix.name in names]


def _bound(max_mixed_tokens: int) -> str:
    if not max_mixed_tokens:
        return "steps with decodes not bounded apart"
    return f"steps with decodes of at most {max_mixed_tokens} tokens"


def _save(folder: Path, results: list[WindowResult], points: list[Point], bench: Bench) -> None:
    """Everything so far: a study takes minutes, and may be broken off."""
    folder.mkdir(parents=True, exist_ok=True)
    study = bench.study
    notes = (
        f"Simulated, not served: {study.model} on {study.machine}; ours holds "
        f"{', '.join(study.plans)}; blocks of {study.block_tokens} tokens, "
        f"{_bound(study.max_mixed_tokens)}; arrivals of the first "
        f"{study.warmup_s:g} s are not judged; targets: {bench.targets.source}. "
        f"layout_bound: the best static layout of every {study.cell_s:g} s over the best of "
        "all, without any price for changing."
    )
    found = figures(results) | (article_figures(points) if points else {})
    content = msgspec.json.encode(summary(found, notes))
    (folder / "summary.json").write_bytes(msgspec.json.format(content, indent=1) + b"\n")
    save_page(results, bench, folder / "index.html")
    if points:
        save_sweep(points, folder / "article.html", f"{study.model} on {study.machine}, simulated")
    for result in results:
        (folder / f"{result.name}.decisions.txt").write_text(explained(result) + "\n")
