"""A run in numbers: built from its records, printed as text, written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from nitsum.metrics.fairness import service_gaps
from nitsum.metrics.goodput import (
    TargetOf,
    Window,
    arrival_window,
    attainment,
    by_tier,
    chains,
    held,
    judged,
)
from nitsum.metrics.percentiles import MIN_SAMPLES_P99, Summary, summarise
from nitsum.metrics.ranks import RankUse, WorkOf, rank_use
from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.metrics.series import output_tokens, prediction_error, prompt_tokens
from nitsum.metrics.switches import SwitchSummary, summarise_switches
from nitsum.metrics.targets import Targets, own_target


class TierReport(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that asked for one tier and arrived in the window."""

    tier: str
    num_requests: int
    num_met: int
    attainment: float | None
    goodput_per_s: float | None
    num_refused: int
    num_unfinished: int
    num_downgraded: int
    num_late: int = 0
    """Kept the tier without a promise, as the engine's own events tell; a client does not know."""
    num_displaced: int
    """Displacements, not requests."""
    queue_s: Summary
    ttft_s: Summary
    tpot_s: Summary
    e2e_s: Summary
    longest_gap_s: Summary


class ScaledTargets(msgspec.Struct, frozen=True):
    """What would have been attained with all TTFT targets `factor` times as long."""

    factor: float
    attainment: float | None
    goodput_per_s: float | None


class ChainReport(msgspec.Struct, frozen=True, kw_only=True):
    num_chains: int
    num_complete: int
    latency_s: Summary
    deadline_attainment: float | None


class TierFairness(msgspec.Struct, frozen=True, kw_only=True):
    tier: str
    num_intervals: int
    mean_gap_tokens: float
    max_gap_tokens: float
    mean_ratio: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the event stream says about a run."""

    window: Window
    warmup_s: float
    """Arrivals of the first seconds that were left out."""
    num_requests: int
    goodput_per_s: float | None
    attainment: float | None
    output_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    tiers: list[TierReport]
    scaled: list[ScaledTargets]
    """With k halved and doubled; only under a targets file."""
    chains: ChainReport
    fairness: list[TierFairness]
    switches: list[SwitchSummary]
    ranks: list[RankUse]
    """Empty where steps are not known."""
    step_prediction_error: float | None
    num_restarts: int
    notes: list[str]


def build_report(
    run: Recorder,
    *,
    targets: Targets | None = None,
    warmup_s: float = 0.0,
    end_s: float | None = None,
    small_samples: bool = False,
    work_of: WorkOf | None = None,
    own_words: str = "each request's own, as the server set them",
) -> Report:
    """Judge a run by `targets`, or without any by what each request was held to on arrival, which
    is `own_words`. A tier of requests that were held to nothing is not judged.

    Requests are judged by the tier they asked for. Those that arrived in the first `warmup_s`, or
    after `end_s`, are left out of everything but switches. `small_samples` allows a P99 from fewer
    than 1,000 samples. `work_of` knows the model, for what ranks read and compute a second.
    """
    everything = list(run.requests.values())
    window = arrival_window(everything, warmup_s, end_s)
    records = judged(everything, window)
    target_of = own_target if targets is None else targets.of_record
    total = attainment(records, window, target_of)
    return Report(
        window=window,
        warmup_s=warmup_s,
        num_requests=total.num_requests,
        goodput_per_s=total.goodput_per_s,
        attainment=total.share,
        output_tokens_per_s=_rate(output_tokens(everything, window), window),
        prompt_tokens_per_s=_rate(prompt_tokens(everything, window), window),
        tiers=[
            _tier(tier, of_tier, window, target_of, small_samples)
            for tier, of_tier in by_tier(records).items()
        ],
        scaled=_scaled(records, window, targets),
        chains=_chain_report(records, small_samples),
        fairness=_fairness(everything, window),
        switches=summarise_switches(
            run.switches, everything, run.steps, small_samples=small_samples
        ),
        ranks=rank_use(run.steps, window, work_of),
        step_prediction_error=prediction_error(run.steps),
        num_restarts=len(run.restarts),
        notes=[
            f"targets: {own_words if targets is None else f'file ({targets.source})'}",
            *_notes(everything, records, window, small_samples),
            *_free_notes(records, target_of),
        ],
    )


def with_server(
    report: Report,
    server: Recorder,
    work_of: WorkOf | None = None,
    *,
    small_samples: bool = False,
) -> Report:
    """A client's report with what only the server's own events of the same time tell."""
    window = report.window
    switches = [switch for switch in server.switches if window.holds(switch.started_s)]
    requests = list(server.requests.values())
    return msgspec.structs.replace(
        report,
        ranks=rank_use(server.steps, window, work_of),
        switches=summarise_switches(switches, requests, server.steps, small_samples=small_samples),
        step_prediction_error=prediction_error(s for s in server.steps if window.holds(s.ended_s)),
        num_restarts=sum(window.holds(restart.at_s) for restart in server.restarts),
    )


def _rate(count: int, window: Window) -> float | None:
    return count / window.length_s if window.length_s > 0 else None


def _tier(
    tier: str,
    records: list[RequestRecord],
    window: Window,
    target_of: TargetOf,
    small_samples: bool,
) -> TierReport:
    reached = attainment(records, window, target_of)

    def summary(name: str) -> Summary:
        return summarise((getattr(r, name) for r in records), small_samples=small_samples)

    return TierReport(
        tier=tier,
        num_requests=reached.num_requests,
        num_met=reached.num_met,
        attainment=reached.share,
        goodput_per_s=reached.goodput_per_s,
        num_refused=sum(r.outcome == "refused" for r in records),
        num_unfinished=sum(r.outcome == "unfinished" for r in records),
        num_downgraded=sum(r.tier_served != r.tier_asked for r in records),
        num_late=sum(r.late for r in records),
        num_displaced=sum(r.num_displaced for r in records),
        queue_s=summary("queue_s"),
        ttft_s=summary("ttft_s"),
        tpot_s=summary("tpot_s"),
        e2e_s=summary("e2e_s"),
        longest_gap_s=summary("longest_gap_s"),
    )


def _scaled(
    records: Sequence[RequestRecord], window: Window, targets: Targets | None
) -> list[ScaledTargets]:
    if targets is None:
        return []
    results: list[ScaledTargets] = []
    for factor in (0.5, 2.0):
        reached = attainment(records, window, targets.with_k(factor).of_record)
        results.append(ScaledTargets(factor, reached.share, reached.goodput_per_s))
    return results


def _chain_report(records: Sequence[RequestRecord], small_samples: bool) -> ChainReport:
    found = chains(records)
    judgements = [chain.met_deadline for chain in found if chain.met_deadline is not None]
    return ChainReport(
        num_chains=len(found),
        num_complete=sum(chain.latency_s is not None for chain in found),
        latency_s=summarise((chain.latency_s for chain in found), small_samples=small_samples),
        deadline_attainment=sum(judgements) / len(judgements) if judgements else None,
    )


def _fairness(records: Sequence[RequestRecord], window: Window) -> list[TierFairness]:
    return [
        TierFairness(
            tier=gap.tier,
            num_intervals=gap.num_intervals,
            mean_gap_tokens=gap.mean_gap,
            max_gap_tokens=gap.max_gap,
            mean_ratio=gap.mean_ratio,
        )
        for gap in service_gaps(records, window)
    ]


def _notes(
    everything: Sequence[RequestRecord],
    records: Sequence[RequestRecord],
    window: Window,
    small_samples: bool,
) -> list[str]:
    """What a reader must know to judge the numbers."""
    notes: list[str] = []
    early = sum(r.arrival_s < window.start_s for r in everything)
    if early:
        notes.append(f"warm-up: {early} requests left out")
    aborted = sum(r.outcome == "abort" and window.holds(r.arrival_s) for r in everything)
    if aborted:
        notes.append(f"{aborted} requests broken off by their client are not judged")
    unfinished = sum(r.outcome == "unfinished" for r in records)
    if unfinished:
        notes.append(
            f"{unfinished} requests had no end when the events ended; they count as missed"
        )
    if small_samples:
        notes.append(f"P99 also from fewer than {MIN_SAMPLES_P99} samples, as asked")
    return notes


def _free_notes(records: Sequence[RequestRecord], target_of: TargetOf) -> list[str]:
    tiers = by_tier(records).keys() - by_tier(held(records, target_of)).keys()
    return [f"{tier}: no targets; left out of goodput and attainment" for tier in sorted(tiers)]


# --- output ---------------------------------------------------------------------------------------


def save_report(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def print_report(report: Report, console: Console | None = None) -> None:
    """The report as tables; `-` stands for too few samples."""
    console = console or Console()
    console.print(_headline(report))
    console.print(_tier_table(report))
    if report.chains.num_chains:
        console.print(_chain_line(report.chains))
    if report.switches:
        console.print(_switch_table(report))
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


def _tier_table(report: Report) -> Table:
    table = Table("tier", title="Latency: P50 / P90 / P99")
    for name in ("requests", "met", "goodput/s", "TTFT", "TPOT", "gap P90", "ref/down/late/disp"):
        table.add_column(name, justify="right")
    for tier in report.tiers:
        table.add_row(
            tier.tier,
            str(tier.num_requests),
            _attained(tier),
            _number(tier.goodput_per_s),
            _percentiles(tier.ttft_s),
            _percentiles(tier.tpot_s),
            _seconds(tier.longest_gap_s.p90),
            f"{tier.num_refused}/{tier.num_downgraded}/{tier.num_late}/{tier.num_displaced}",
        )
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
    table = Table("switch", "done", "failed", "streams", title=None)
    for name in ("added pause P50", "P99", "max", "took P50", "MB P50", "left", "decode x"):
        table.add_column(name, justify="right")
    for switch in report.switches:
        pause, moved = switch.added_pause_s, switch.bytes_moved.p50
        table.add_row(
            f"{switch.from_plan} -> {switch.to_plan}",
            str(switch.num_switches),
            str(switch.num_failed),
            str(pause.num),
            *(_seconds(value) for value in (pause.p50, pause.p99, pause.max)),
            _seconds(switch.duration_s.p50),
            _number(None if moved is None else moved / 1e6),
            str(switch.num_left_behind),
            _number(switch.precopy_slowdown.p50),
        )
    return table


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
