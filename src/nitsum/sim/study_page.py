"""A study's results: one table for the terminal, one page with a picture of every window."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from nitsum.metrics.goodput import Window
from nitsum.metrics.html import line_plot
from nitsum.metrics.series import Series
from nitsum.sim.study import Bench, Served, WindowResult, explained, line_of

_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;color:#222}"
    "svg{width:100%;height:auto}text{font:11px system-ui,sans-serif;fill:#444}"
    "pre{overflow-x:auto;font-size:12px;background:#f6f6f6;padding:1em}"
    ".legend span{margin-right:1.2em;white-space:nowrap}"
)


def table(results: Sequence[WindowResult]) -> str:
    """A line a window: ours against the best static layout, hindsight and what layouts allow."""
    head = f"{'window':<24}{'best static':>20}{'ours':>8}{'ratio':>8}{'hindsight':>11}{'bound':>8}"
    lines = [head]
    for r in results:
        best = f"{r.best_static.system} {r.best_static.goodput_per_s:.3f}"
        lines.append(
            f"{r.name:<24}{best:>20}{r.ours.goodput_per_s:>8.3f}{r.over_static(r.ours):>8.3f}"
            f"{r.over_hindsight:>11.3f}{r.layout_bound:>8.3f}"
        )
        for cost_s, each in r.by_cost.items():
            label = f"  switches +{cost_s * 1e3:g} ms"
            lines.append(
                f"{label:<44}{each.goodput_per_s:>8.3f}{r.over_static(each):>8.3f}"
                f"   {each.num_switches} switches"
            )
    return "\n".join(lines)


def save_page(results: Sequence[WindowResult], bench: Bench, path: Path) -> None:
    study = bench.study
    title = f"Does changing plans pay? {study.model} on {study.machine}, simulated"
    parts = [f"<h1>{escape(title)}</h1>", f"<pre>{escape(table(results))}</pre>"]
    for result in results:
        parts += _window(result, study.cell_s)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
    )


def _window(result: WindowResult, cell_s: float) -> list[str]:
    systems = [*result.statics, result.path, result.ours]
    span = Window(0.0, result.ours.span_s)
    lines = "\n".join(line_of(each) for each in systems)
    return [
        f"<h2>{escape(result.name)}</h2>",
        f"<p>Requests in time per second, by the {cell_s:g} s in which they arrived.</p>",
        line_plot([_series(each, cell_s) for each in systems], span),
        f"<pre>{escape(lines)}</pre>",
        f"<details><summary>Decisions</summary><pre>{escape(explained(result))}</pre></details>",
    ]


def _series(each: Served, cell_s: float) -> Series:
    """The last cell may be shorter than the others."""
    points: list[tuple[float, float | None]] = []
    for i, count in enumerate(each.met):
        length_s = min(cell_s, each.span_s - i * cell_s)
        points.append((i * cell_s + length_s / 2, count / length_s if length_s > 1.0 else None))
    return Series(each.system, points)
