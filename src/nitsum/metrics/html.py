"""A report as one self-contained HTML page with inline SVG: no scripts, nothing fetched."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.console import Console

from nitsum.metrics.goodput import Window, held, judged
from nitsum.metrics.records import Recorder, SwitchRecord
from nitsum.metrics.report import Report
from nitsum.metrics.series import (
    LaneSpan,
    Series,
    attainment_over_time,
    lane_spans,
    queue_depth,
    token_rate,
)
from nitsum.metrics.tables import print_report
from nitsum.metrics.targets import Targets, own_target

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 180, 56, 22
_COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#5d6d7e")
_DEGREE_COLOURS = {1: "#85c1e9", 2: "#2e86c1", 4: "#1b4f72", 8: "#6c3483"}
_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}"
    "pre{overflow-x:auto;font-size:12px;background:#f6f6f6;padding:1em}"
    "svg{width:100%;height:auto}text{font:11px system-ui,sans-serif;fill:#444}"
    ".legend span{margin-right:1.2em;white-space:nowrap}"
)


def save_html(
    report: Report, run: Recorder, path: Path, *, title: str, targets: Targets | None = None
) -> None:
    path.write_text(render(report, run, title=title, targets=targets), encoding="utf-8")


def render(report: Report, run: Recorder, *, title: str, targets: Targets | None = None) -> str:
    """The page: lanes over time, queues, attainment by tier, token rate, and the text report."""
    window = report.window
    parts = [f"<h1>{escape(title)}</h1>"]
    if window.length_s > 0:
        parts.extend(_plots(run, window, targets))
    parts.append(f"<h2>Numbers</h2><pre>{escape(_as_text(report))}</pre>")
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _plots(run: Recorder, window: Window, targets: Targets | None) -> Iterable[str]:
    everything = list(run.requests.values())
    target_of = own_target if targets is None else targets.of_record
    switches = [s for s in run.switches if window.holds(s.started_s)]
    yield "<h2>Lanes: which degree each rank ran at</h2>"
    yield _lane_plot(lane_spans(run.steps, window), switches, window)
    yield "<h2>Requests waiting for their first step</h2>"
    yield line_plot(queue_depth(everything, window), window, switches)
    yield "<h2>Share of arrivals that met their targets</h2>"
    records = held(judged(everything, window), target_of)
    reached = attainment_over_time(records, window, target_of)
    yield line_plot(reached, window, switches, top=1.0)
    yield "<h2>Answer tokens per second</h2>"
    yield line_plot([token_rate(run.steps, window)], window, switches)


def _as_text(report: Report) -> str:
    text = io.StringIO()
    print_report(report, Console(width=170, file=text, color_system=None))
    return text.getvalue()


def line_plot(
    series: Sequence[Series],
    window: Window,
    switches: Sequence[SwitchRecord] = (),
    top: float | None = None,
) -> str:
    """Lines over time with a legend; a line breaks where there is no value."""
    values = [y for line in series for _, y in line.points if y is not None]
    highest = top or max(values, default=0.0) or 1.0
    lines = [
        _polylines(line, window, highest, _COLOURS[i % len(_COLOURS)])
        for i, line in enumerate(series)
    ]
    axes = _axes(window, _HEIGHT, [(0.0, "0"), (1.0, f"{highest:g}")])
    marks = _switch_marks(switches, window, _HEIGHT)
    names = [(line.name, _COLOURS[i % len(_COLOURS)]) for i, line in enumerate(series)]
    return _svg(_HEIGHT, axes + marks + "".join(lines)) + _legend(names)


def _x(at_s: float, window: Window) -> float:
    share = (at_s - window.start_s) / window.length_s
    return _LEFT + share * (_WIDTH - _LEFT - 8)


def _y(share: float, height: int) -> float:
    return height - _BOTTOM - share * (height - _BOTTOM - 8)


def _polylines(line: Series, window: Window, highest: float, colour: str) -> str:
    runs: list[list[str]] = [[]]
    for at_s, value in line.points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{_x(at_s, window):.1f},{_y(value / highest, _HEIGHT):.1f}")
    return "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" stroke-linecap="round" '
        f'points="{" ".join(run if len(run) > 1 else run * 2)}"/>'
        for run in runs
        if run
    )


def _axes(window: Window, height: int, ticks: Sequence[tuple[float, str]]) -> str:
    left, base = _LEFT, height - _BOTTOM
    parts = [f'<path d="M{left} 8V{base}H{_WIDTH - 8}" fill="none" stroke="#999"/>']
    for share, label in ticks:
        y = _y(share, height) + 4
        parts.append(f'<text x="{left - 6}" y="{y:.0f}" text-anchor="end">{escape(label)}</text>')
    for i in range(5):
        at_s = i / 4 * window.length_s
        x = _x(window.start_s + at_s, window)
        parts.append(f'<text x="{x:.0f}" y="{height - 6}" text-anchor="middle">{at_s:.0f} s</text>')
    return "".join(parts)


def _switch_marks(switches: Sequence[SwitchRecord], window: Window, height: int) -> str:
    """A dashed line where a switch started; its plans on hover."""
    return "".join(
        f'<path d="M{_x(s.started_s, window):.1f} 8V{height - _BOTTOM}" stroke="#888" '
        f'stroke-dasharray="3 3"><title>{escape(f"{s.from_plan} to {s.to_plan}")}</title></path>'
        for s in switches
    )


def _lane_plot(spans: Sequence[LaneSpan], switches: Sequence[SwitchRecord], window: Window) -> str:
    """A row per rank; a bar as opaque as the share of time spent in steps of that degree."""
    num_ranks = max((span.first_rank + span.degree for span in spans), default=1)
    height = _BOTTOM + 8 + 22 * num_ranks
    bars = [_bar(span, window, num_ranks, height) for span in spans]
    ticks = [((num_ranks - r - 0.5) / num_ranks, f"rank {r}") for r in range(num_ranks)]
    marks = _switch_marks(switches, window, height)
    degrees = sorted({span.degree for span in spans})
    names = [(f"TP{degree}", _degree_colour(degree)) for degree in degrees]
    return _svg(height, "".join(bars) + _axes(window, height, ticks) + marks) + _legend(names)


def _bar(span: LaneSpan, window: Window, num_ranks: int, height: int) -> str:
    left, right = _x(span.start_s, window), _x(span.end_s, window)
    top = _y((num_ranks - span.first_rank) / num_ranks, height)
    bottom = _y((num_ranks - span.first_rank - span.degree) / num_ranks, height)
    return (
        f'<rect x="{left:.1f}" y="{top + 1:.1f}" width="{right - left:.1f}" '
        f'height="{bottom - top - 2:.1f}" fill="{_degree_colour(span.degree)}" '
        f'opacity="{0.15 + 0.85 * span.share:.2f}"/>'
    )


def _degree_colour(degree: int) -> str:
    return _DEGREE_COLOURS.get(degree, "#566573")


def _svg(height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{content}</svg>'


def _legend(names: Sequence[tuple[str, str]]) -> str:
    spans = "".join(
        f'<span><b style="color:{colour}">&#9632;</b> {escape(name)}</span>'
        for name, colour in names
    )
    return f'<p class="legend">{spans}</p>'
