"""A sweep as one self-contained HTML page: curves over load, and a table of every point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from nitsum.sim.sweep import Point, curve, line_of, tier_of

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 220, 60, 28
_COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#5d6d7e", "#117a65", "#873600")
_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;color:#222}"
    "svg{width:100%;height:auto}text{font:11px system-ui,sans-serif;fill:#444}"
    "pre{overflow-x:auto;font-size:12px;background:#f6f6f6;padding:1em}"
    ".legend span{margin-right:1.2em;white-space:nowrap}"
)

Height = Callable[[Point], float | None]


def save_page(points: Sequence[Point], path: Path, title: str) -> None:
    path.write_text(render(points, title), encoding="utf-8")


def render(points: Sequence[Point], title: str) -> str:
    """Goodput and attainment by tier over load, a line for each system."""
    tiers = sorted({tier.tier for point in points for tier in point.report.tiers})
    parts = [f"<h1>{escape(title)}</h1>", "<h2>Goodput, requests/s</h2>"]
    parts.append(_plot(points, lambda point: point.report.goodput_per_s))
    for tier in tiers:
        parts.append(f"<h2>Share of {escape(tier)} requests within their targets</h2>")
        parts.append(_plot(points, _attainment_of(tier), top=1.0))
    table = escape("\n".join(line_of(point) for point in points))
    parts.append(f"<h2>Every point</h2><pre>{table}</pre>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _attainment_of(tier: str) -> Height:
    def height(point: Point) -> float | None:
        found = tier_of(point, tier)
        return None if found is None else found.attainment

    return height


def _plot(points: Sequence[Point], height: Height, top: float | None = None) -> str:
    systems = list(dict.fromkeys(point.system for point in points))
    most_load = max(point.load for point in points)
    highest = top or max((height(point) or 0.0 for point in points), default=0.0) or 1.0
    lines = "".join(
        _line(curve(points, name), height, most_load, highest, _COLOURS[i % len(_COLOURS)])
        for i, name in enumerate(systems)
    )
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{_axes(points, most_load, highest)}{lines}</svg>'
    return svg + _legend(systems)


def _line(
    points: Sequence[Point], height: Height, most_load: float, highest: float, colour: str
) -> str:
    places = [
        (_x(point.load / most_load), _y(value / highest))
        for point in points
        if (value := height(point)) is not None
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
    return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>{dots}'


def _axes(points: Sequence[Point], most_load: float, highest: float) -> str:
    frame = f'<path d="M{_LEFT} 8V{_y(0)}H{_WIDTH - 8}" fill="none" stroke="#999"/>'
    ticks = [
        f'<text x="{_x(load / most_load):.0f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{load:g}x</text>"
        for load in sorted({point.load for point in points})
    ]
    labels = [
        f'<text x="{_LEFT - 6}" y="{_y(share) + 4:.0f}" text-anchor="end">{share * highest:.3g}'
        "</text>"
        for share in (0.0, 0.5, 1.0)
    ]
    return frame + "".join(ticks + labels)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - 20)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - 12)


def _legend(systems: Sequence[str]) -> str:
    spans = "".join(
        f'<span><b style="color:{_COLOURS[i % len(_COLOURS)]}">&#9632;</b> {escape(name)}</span>'
        for i, name in enumerate(systems)
    )
    return f'<p class="legend">{spans}</p>'
