"""`nitsum check-config`: everything that is wrong with a configuration, at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nitsum.cli.build import build_engine_config, build_plans, check_books, check_tls, tiers_of
from nitsum.cli.checkpoint import (
    checkpoint_folder,
    converted_folder,
    demo_folder,
    is_complete,
)
from nitsum.cli.drawing import draw_plan_set
from nitsum.cli.ports import port_problem
from nitsum.cli.settings import ServeSettings
from nitsum.cli.sources import add_flags, resolve
from nitsum.config import EngineConfig
from nitsum.cost.shapes import DEMO_NAME
from nitsum.errors import ConfigError, NitsumError, require_torch
from nitsum.shape import Geometry, ModelShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ServeSettings)


def run(args: argparse.Namespace) -> int:
    """Print the problems (status 2), or the plans and what they hold (status 0)."""
    settings, problems = resolve(ServeSettings, args, os.environ)
    problems += find_problems(settings)
    if problems:
        print("\n".join(f"- {problem}" for problem in problems))
        return 2
    print(draw_plan_set(build_plans(settings)))
    for line in _capacity(settings):
        print(line)
    print("\nThe configuration is fine.")
    return 0


def find_problems(settings: ServeSettings) -> list[str]:
    """What is wrong with settings that could be read; each entry says what to do."""
    checks: tuple[Callable[[ServeSettings], object], ...] = (
        lambda s: require_torch(),
        lambda s: build_plans(s),
        tiers_of,
        check_books,
        check_tls,
        _check_model,
    )
    problems = [problem for check in checks if (problem := _problem_of(check, settings))]
    if not problems and (problem := _problem_of(_check_together, settings)):
        problems.append(problem)
    return problems + [
        problem for problem in (port_problem(settings.host, settings.port),) if problem
    ]


def _problem_of(check: Callable[[ServeSettings], object], settings: ServeSettings) -> str | None:
    try:
        check(settings)
    except NitsumError as error:
        return str(error)
    return None


def _check_model(settings: ServeSettings) -> None:
    """The model is there and is one the decoder supports; nothing is fetched or converted."""
    if not _must_be_made(settings.model):
        ModelShape.from_folder(checkpoint_folder(settings.model))


def _must_be_made(model: str) -> bool:
    """Whether `serve` will fetch or convert first, so that nothing can be said before."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.is_file() and not is_complete(converted_folder(path))
    return model == DEMO_NAME and not path.is_dir() and not is_complete(demo_folder())


def _check_together(settings: ServeSettings) -> None:
    """What the settings say about each other and about the model."""
    config = build_engine_config(settings, Path(settings.model))
    if _must_be_made(settings.model) or not config.kv_bytes:
        return
    geometry = _geometry(settings, config)
    narrowest = config.plans.degrees[0]
    if kv_tokens(config, geometry, narrowest) < config.max_model_len:
        raise ConfigError(
            f"--max-model-len: the KV arena of a TP{narrowest} lane holds "
            f"{kv_tokens(config, geometry, narrowest)} tokens, fewer than {config.max_model_len}. "
            "Raise --kv-memory or lower --max-model-len."
        )


def _geometry(settings: ServeSettings, config: EngineConfig) -> Geometry:
    shape = ModelShape.from_folder(checkpoint_folder(settings.model))
    return Geometry(shape, config.max_tp, config.min_tp)


def _capacity(settings: ServeSettings) -> Iterator[str]:
    """How much context the KV arena of one rank holds, by lane degree."""
    if _must_be_made(settings.model):
        return
    config = build_engine_config(settings, Path(settings.model))
    if not config.kv_bytes:
        return
    geometry = _geometry(settings, config)
    yield ""
    for degree in config.plans.degrees:
        yield f"A TP{degree} lane has KV for {kv_tokens(config, geometry, degree):,} tokens."


def kv_tokens(config: EngineConfig, geometry: Geometry, degree: int) -> int:
    """Tokens whose KV a lane of `degree` can hold when it has its ranks' arenas to itself."""
    dtype_bytes = 4 if config.dtype == "float32" else 2
    num_units = config.kv_bytes // geometry.unit_bytes(config.block_tokens, dtype_bytes)
    return num_units // geometry.units_per_page(degree) * config.block_tokens
