"""A report as flat figures, for a result's `summary.json`: names end in their unit."""

from __future__ import annotations

from collections.abc import Iterator

from nitsum.metrics.percentiles import Summary
from nitsum.metrics.ranks import mean_of
from nitsum.metrics.report import Report, TierReport
from nitsum.metrics.switches import SwitchSummary


def figures(report: Report, prefix: str = "") -> dict[str, float]:
    """Every number that rests on enough samples, by name."""
    pairs = [*_overall(report)]
    for tier in report.tiers:
        pairs.extend(_tier(tier))
    for switch in report.switches:
        pairs.extend(_switch(switch))
    return {prefix + name: float(value) for name, value in pairs if value is not None}


def _overall(report: Report) -> Iterator[tuple[str, float | None]]:
    yield "goodput_requests_per_s", report.goodput_per_s
    yield "attainment_share", report.attainment
    yield "output_tokens_per_s", report.output_tokens_per_s
    yield "prompt_tokens_per_s", report.prompt_tokens_per_s
    yield "num_requests", float(report.num_requests)
    for scaled in report.scaled:
        yield f"goodput_at_{scaled.factor:g}k_requests_per_s", scaled.goodput_per_s
    for figure in ("step_share", "busy_share", "read_bytes_per_s", "flops_per_s"):
        yield figure, mean_of(report.ranks, figure)
    for number, rank in enumerate(report.ranks):
        yield f"rank{number}_busy_share", rank.busy_share
        yield f"rank{number}_read_bytes_per_s", rank.read_bytes_per_s
        yield f"rank{number}_flops_per_s", rank.flops_per_s
    yield "step_prediction_error_share", report.step_prediction_error
    if report.chains.num_chains:
        yield from _summary("chain_latency", report.chains.latency_s)
        yield "chain_deadline_share", report.chains.deadline_attainment


def _tier(tier: TierReport) -> Iterator[tuple[str, float | None]]:
    yield f"{tier.tier}_num_requests", float(tier.num_requests)
    yield f"{tier.tier}_goodput_requests_per_s", tier.goodput_per_s
    yield f"{tier.tier}_attainment_share", tier.attainment
    for name, summary in (
        ("queue", tier.queue_s),
        ("ttft", tier.ttft_s),
        ("tpot", tier.tpot_s),
        ("e2e", tier.e2e_s),
        ("longest_gap", tier.longest_gap_s),
    ):
        yield from _summary(f"{tier.tier}_{name}", summary)


def _switch(switch: SwitchSummary) -> Iterator[tuple[str, float | None]]:
    name = f"switch_{_word(switch.from_plan)}_to_{_word(switch.to_plan)}"
    yield f"{name}_num", float(switch.num_switches)
    yield from _summary(f"{name}_added_pause", switch.added_pause_s)
    yield f"{name}_added_pause_max_s", switch.added_pause_s.max
    yield f"{name}_duration_p50_s", switch.duration_s.p50
    yield f"{name}_moved_p50_bytes", switch.bytes_moved.p50
    yield f"{name}_precopy_slowdown_ratio", switch.precopy_slowdown.p50


def _summary(name: str, summary: Summary) -> Iterator[tuple[str, float | None]]:
    yield f"{name}_p50_s", summary.p50
    yield f"{name}_p90_s", summary.p90
    yield f"{name}_p99_s", summary.p99


def _word(plan: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in plan).lower()
