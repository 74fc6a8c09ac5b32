"""A report as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from nitsum.metrics.percentiles import Summary
from nitsum.metrics.ranks import RankUse
from nitsum.metrics.report import ChainReport, Report, TierReport
from nitsum.metrics.switches import SwitchSummary


def print_report(report: Report, console: Console | None = None) -> None:
    """The report as tables; `-` stands for too few samples."""
    console = console or Console()
    console.print(_headline(report))
    console.print(_request_table(report))
    console.print(_latency_table(report))
    if report.chains.num_chains:
        console.print(_chain_line(report.chains))
    if report.switches:
        console.print(_switch_table(report))
        console.print(_pause_table(report))
    for fair in report.fairness:
        console.print(
            f"service gap, {fair.tier}: mean {fair.mean_gap_tokens:.0f}, max "
            f"{fair.max_gap_tokens:.0f} weighted tokens per 10 s; least/most {fair.mean_ratio:.2f}"
        )
    if report.ranks:
        console.print(_ranks_line(report.ranks))
    for note in report.notes:
        console.print(f"note: {note}", style="dim")


def _ranks_line(ranks: Sequence[RankUse]) -> str:
    """Of each rank: time in steps, at work in them, bytes read and operations a second."""
    return "by rank: " + "; ".join(_rank_words(rank) for rank in ranks)


def _rank_words(rank: RankUse) -> str:
    words = f"busy {rank.busy_share:.1%} (in steps {rank.step_share:.1%})"
    if rank.read_bytes_per_s is not None and rank.flops_per_s is not None:
        words += (
            f", {rank.read_bytes_per_s / 1e12:.2f} TB/s read, {rank.flops_per_s / 1e12:.0f} TFLOP/s"
        )
    return words


def _headline(report: Report) -> str:
    return (
        f"{report.num_requests} requests in {report.window.length_s:.1f} s: "
        f"goodput {_number(report.goodput_per_s)}/s, attainment {_attained(report)}, "
        f"{_number(report.output_tokens_per_s)} output tok/s"
    )


def _request_table(report: Report) -> Table:
    columns = ("requests", "met", "goodput/s", "ref/down/late/disp")
    table = _table("tier", *columns, title="Requests within their targets")
    for tier in report.tiers:
        counts = tier.num_refused, tier.num_downgraded, tier.num_late, tier.num_displaced
        table.add_row(
            tier.tier,
            str(tier.num_requests),
            _attained(tier),
            _number(tier.goodput_per_s),
            "/".join(map(str, counts)),
        )
    return table


def _latency_table(report: Report) -> Table:
    table = _table("tier", "TTFT", "TPOT", "gap P90", title="Latency: P50 / P90 / P99")
    for tier in report.tiers:
        gap = _seconds(tier.longest_gap_s.p90)
        table.add_row(tier.tier, _percentiles(tier.ttft_s), _percentiles(tier.tpot_s), gap)
    return table


def _table(first: str, *figures: str, title: str) -> Table:
    """For pages of 80 columns: what is too long folds, nothing is cut."""
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right", overflow="fold")
    return table


def _percentiles(summary: Summary) -> str:
    """All in the unit of the middle one."""
    values = (summary.p50, summary.p90, summary.p99)
    if summary.p50 is None:
        return "-"
    unit, scale = ("ms", 1e3) if summary.p50 < 1.0 else ("s", 1.0)
    shown = ("-" if value is None else f"{value * scale:.3g}" for value in values)
    return f"{'/'.join(shown)} {unit}"


def _switch_table(report: Report) -> Table:
    columns = ("done", "failed", "left", "took P50", "MB P50", "decode x")
    table = _table("switch", *columns, title="Switches")
    for switch in report.switches:
        moved = switch.bytes_moved.p50
        table.add_row(
            _switch_name(switch),
            str(switch.num_switches),
            str(switch.num_failed),
            str(switch.num_left_behind),
            _seconds(switch.duration_s.p50),
            _number(None if moved is None else moved / 1e6),
            _number(switch.precopy_slowdown.p50),
        )
    return table


def _pause_table(report: Report) -> Table:
    table = _table("switch", "streams", "P50", "P99", "max", title="Added pause of their streams")
    for switch in report.switches:
        pause = switch.added_pause_s
        times = (_seconds(value) for value in (pause.p50, pause.p99, pause.max))
        table.add_row(_switch_name(switch), str(pause.num), *times)
    return table


def _switch_name(switch: SwitchSummary) -> str:
    return f"{switch.from_plan} -> {switch.to_plan}"


def _chain_line(chain: ChainReport) -> str:
    return (
        f"chains: {chain.num_complete} of {chain.num_chains} complete, "
        f"P50 {_seconds(chain.latency_s.p50)}, P90 {_seconds(chain.latency_s.p90)}, "
        f"deadline met {_percent(chain.deadline_attainment)}"
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1.0 else f"{value:.2f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _attained(part: Report | TierReport) -> str:
    """Of requests that there were."""
    if part.attainment is None and part.num_requests:
        return "no targets"
    return _percent(part.attainment)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
