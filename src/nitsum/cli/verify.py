"""`nitsum verify`: prove on this machine that switching the layout changes no result."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nitsum.bench.parity import (
    REQUEST_ROUNDING_RATIO,
    ROUNDING_RATIO,
    Report,
    Tolerance,
)
from nitsum.bench.provenance import summary
from nitsum.bench.reference import Difference, require_transformers
from nitsum.bench.scenario import Scenario, engine_config
from nitsum.bench.stages import stages
from nitsum.bench.tables import percent, print_line, print_table, size
from nitsum.bench.verify import check_plans, verify
from nitsum.cli.build import build_plans
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.readers import boolean, one_of, text, whole_number
from nitsum.cli.settings import DeviceSettings, PlanSettings
from nitsum.cli.sources import add_flags, setting, settings_or_error
from nitsum.shape import ModelShape

_NAMES = {"transformers": "Hugging Face transformers", "static": "the static layout"}


@dataclass(frozen=True, kw_only=True)
class VerifySettings(DeviceSettings, PlanSettings):
    """What is verified, and how thoroughly."""

    ranks: int = setting(whole_number(1), 4, "processes; a power of two", "N")
    model: str = setting(
        text, "", "a checkpoint folder, a .gguf file, or `demo`", "MODEL", positional=True
    )
    switches: int = setting(
        whole_number(1), 20, "plan switches, at least; more while one kind of move is missing", "K"
    )
    requests: int = setting(whole_number(1), 48, "requests, at least", "R")
    tokens: int = setting(whole_number(64), 160, "longest prompt plus answer, tokens", "N")
    seed: int = setting(whole_number(), 0, "of requests and switches", "S")
    inject: Literal["swap-heads", "stale-block", "lost-tail", "wrong-vocab"] | None = setting(
        one_of("swap-heads", "stale-block", "lost-tail", "wrong-vocab"),
        None,
        "plant this fault, to see verification fail: swap-heads, stale-block, lost-tail or "
        "wrong-vocab",
        "FAULT",
    )
    json: bool = setting(boolean, False, "print one JSON object")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, VerifySettings, config=False)


def run(args: argparse.Namespace) -> int:
    """Status 0: proven; 1: a difference was found, or too little happened for a proof."""
    settings = settings_or_error(VerifySettings, args, os.environ)
    require_transformers()
    plans = build_plans(settings)
    check_plans(plans)
    model = checkpoint_folder(settings.model)
    scenario = _scenario(settings, model)
    config = engine_config(
        model,
        plans,
        scenario,
        min_tp=settings.min_tp_of(plans),
        fault=settings.inject,
        device=settings.device,
        dtype=settings.chosen_dtype,
    )
    with stages() as progress:
        report = verify(config, plans, scenario, progress.stage, progress.note)
    if settings.json:
        print(json.dumps(_as_json(report, settings)))
    else:
        print_report(report)
    return 0 if report.verdict == "pass" else 1


def _scenario(settings: VerifySettings, model: Path) -> Scenario:
    shape = ModelShape.from_folder(model)
    return Scenario(
        num_switches=settings.switches,
        num_requests=settings.requests,
        max_tokens=min(settings.tokens, shape.max_positions),
        seed=settings.seed,
    )


def _as_json(report: Report, settings: VerifySettings) -> dict[str, object]:
    where = f"{settings.device}, {settings.chosen_dtype}"
    notes = f"{settings.ranks} ranks, seed {settings.seed}, {where}{_attention(settings)}"
    return {
        "verdict": report.verdict,
        **summary(report.figures, notes),
        "switches": {f"{a} -> {b}": count for (a, b), count in sorted(report.kinds.items())},
        "errors": report.errors,
        "unproven": report.unproven,
    }


def _attention(settings: VerifySettings) -> str:
    """Which library attended, where there is a choice."""
    if settings.device == "cpu":
        return ""
    from nitsum.worker.cuda.attention import chosen_library

    return f", attention on {chosen_library()}"


def print_report(report: Report) -> None:
    """The table a person reads, and the verdict."""
    print_table("Switches", ("from -> to", "number"), _kind_rows(report))
    print_table("What they did", ("", ""), _work_rows(report))
    if report.tolerance is not None:
        columns = ("to", "mean NLL", "at most", "logits", "at most", "")
        print_table("Differences", columns, _difference_rows(report, report.tolerance))
    if report.rounding is not None:
        columns = ("", "RMS of logits", "over transformers'", "at most")
        print_table("Error against float32", columns, _rounding_rows(report, report.rounding))
    for line in [*report.errors[:10], *(f"Not proven: {what}." for what in report.unproven)]:
        print_line(line)
    if len(report.errors) > 10:
        print_line(f"... and {len(report.errors) - 10} errors more.")
    print_line(
        f"Verdict: {report.verdict}", "bold green" if report.verdict == "pass" else "bold red"
    )


def _kind_rows(report: Report) -> list[tuple[str, str]]:
    return [(f"{a} -> {b}", str(count)) for (a, b), count in sorted(report.kinds.items())]


def _work_rows(report: Report) -> list[tuple[str, str]]:
    moved = report.moved
    return [
        ("requests served", str(report.num_requests)),
        ("requests moved in prefill", str(moved["prefill"])),
        ("requests moved in decode", str(moved["decode"])),
        ("requests moved while paused", str(moved["paused"])),
        ("requests handed over by prefill lanes", str(report.num_handed_over)),
        ("cached blocks moved", str(report.num_cached_blocks)),
        ("requests that began with a moved prefix", str(report.num_prefix_hits)),
        ("requests that finished in their old lane", str(report.num_left_behind)),
        ("times a request was computed again for lack of room", str(report.num_recomputed)),
        ("copied between ranks", size(report.bytes_moved)),
        ("units that stayed in place", str(report.units_in_place)),
        ("highest arena use of a rank", percent(report.highest_use)),
        ("highest mean use when a switch began", percent(report.use_at_switch)),
    ]


def _rounding_rows(report: Report, rounding: Difference) -> list[tuple[str, ...]]:
    names = {"transformers": "with switches", "static": "in the static layout"}
    rows = [
        (
            names[name],
            f"{difference.rms:.2e}",
            f"{difference.rms / rounding.rms:.2f}",
            f"{ROUNDING_RATIO:g}",
        )
        for name, difference in report.against.items()
    ]
    worst = f"{report.worst_request_ratio:.2f}"
    rows.append(("the worst request with switches", "", worst, f"{REQUEST_ROUNDING_RATIO:g}"))
    return [("transformers, same dtype", f"{rounding.rms:.2e}", "", ""), *rows]


def _difference_rows(report: Report, limits: Tolerance) -> list[tuple[str, ...]]:
    return [
        (
            _NAMES[name],
            f"{difference.nll_difference:.2e}",
            f"{limits.nll:.0e}",
            f"{difference.logits:.2e}",
            f"{limits.logits:.0e}",
            "ok" if report.within(difference) else f"too large: {difference.worst}",
        )
        for name, difference in report.against.items()
    ]
