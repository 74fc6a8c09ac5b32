"""The published setting: one machine, 30% priority requests, load up to saturation.

Ours, which may change plans, against the widest static layout under first come first served (all
that is ours) and under our scheduler (what the layout alone adds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nitsum.metrics.report import TierReport
from nitsum.sim.run import Options
from nitsum.sim.study import Article, Bench
from nitsum.sim.sweep import Point, curve, peak_goodput, sweep, tier_of
from nitsum.sim.system import static_system, uniform_plan
from nitsum.workload.spec import MixSpec, StreamSpec

PREMIUM = 1.5
"""What a priority request brings, in default ones."""


def article_mix(article: Article) -> MixSpec:
    """At one request per second."""
    stream = StreamSpec(
        name="requests",
        rate_per_s=1.0,
        lengths=article.lengths,
        tiers={"priority": 3.0, "default": 7.0},
    )
    return MixSpec(name="article", duration_s=article.duration_s, streams=(stream,))


def article_points(bench: Bench, article: Article, note: Callable[[str], None]) -> list[Point]:
    """Ours, then the widest layout under our scheduler and under first come first served."""
    widest = uniform_plan(bench.site.num_ranks, bench.site.num_ranks)
    systems = [bench.ours, *(static_system(bench.site, widest, p) for p in ("nitsum", "fcfs"))]
    return sweep(
        systems,
        article_mix(article),
        article.loads,
        bench.targets,
        options=Options(drain_s=bench.study.drain_s),
        warmup_s=article.warmup_s,
        small_samples=True,
        note=note,
    )


def article_figures(points: Sequence[Point]) -> dict[str, float]:
    """Peaks over all loads; latencies at the load at which first come first served peaks."""
    ours, scheduler, fcfs = dict.fromkeys(point.system for point in points)
    peaks = {name: peak_goodput(points, name) for name in (ours, scheduler, fcfs)}
    load = max(curve(points, fcfs), key=lambda point: point.report.goodput_per_s or 0.0).load
    at = {p.system: p for p in points if p.load == load}
    last = {name: curve(points, name)[-1] for name in (ours, scheduler, fcfs)}
    found = {
        "article_goodput_ratio": _ratio(peaks[ours], peaks[fcfs]),
        "article_layout_only_ratio": _ratio(peaks[ours], peaks[scheduler]),
        "article_revenue_ratio": _ratio(_most_revenue(points, ours), _most_revenue(points, fcfs)),
        "article_busy_share": last[ours].busy_share,
        "article_busy_share_static": last[fcfs].busy_share,
        "article_fcfs_peak_load_requests_per_s": load,
        "article_raw_requests_per_s": _rate(last[ours]),
        "article_raw_requests_per_s_static": _rate(last[fcfs]),
    }
    high = {name: _p99(at[name]) for name in (ours, scheduler, fcfs)}
    if high[fcfs] and high[ours] is not None:
        found["article_high_p99_ratio"] = _ratio(high[ours] or 0.0, high[fcfs] or 0.0)
        found["article_priority_p99_reduction"] = 1.0 - found["article_high_p99_ratio"]
    for mine, theirs in zip(curve(points, ours), curve(points, fcfs), strict=True):
        name = f"article_goodput_ratio_at_{mine.load:g}".replace(".", "p")
        found[name] = _ratio(mine.report.goodput_per_s, theirs.report.goodput_per_s)
    return found


def _ratio(mine: float | None, theirs: float | None) -> float:
    return (mine or 0.0) / theirs if theirs else float("inf")


def _p99(point: Point) -> float | None:
    """Of the time to first token of priority requests, seconds."""
    tier = tier_of(point, "priority")
    return None if tier is None else tier.ttft_s.p99


def _most_revenue(points: Sequence[Point], system: str) -> float:
    return max(map(_revenue, curve(points, system)))


def _revenue(point: Point) -> float:
    """Per second, in default requests: what is late brings nothing."""
    return sum((t.goodput_per_s or 0.0) * _price(t) for t in point.report.tiers)


def _price(tier: TierReport) -> float:
    return PREMIUM if tier.tier == "priority" else 1.0


def _rate(point: Point) -> float:
    """Answered requests per second, in time or not."""
    tiers, window = point.report.tiers, point.report.window
    num_answered = sum(t.num_requests - t.num_unfinished - t.num_refused for t in tiers)
    return num_answered / max(window.length_s, 1e-9)
