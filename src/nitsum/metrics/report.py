"""A run in numbers: built from its records, printed as text, written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

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


def save_report(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
