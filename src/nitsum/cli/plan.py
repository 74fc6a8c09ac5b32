"""`nitsum plan`: which few layouts to hold ready for a model, a machine and a workload.

nitsum plan Llama-3.1-70B --machine 8xA100-80GB --workload flip -o plans.yaml
nitsum plan ./model --machine 2xH100 --cost cost.json --workload mix.yaml -o plans.yaml
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from nitsum.cli.build import build_tiers
from nitsum.cli.readers import entries
from nitsum.cli.settings import by_device
from nitsum.control.load import Load, Sample, by_level, sum_up
from nitsum.control.planner import (
    Entry,
    PlanReport,
    PlanSite,
    degrees_that_fit,
    plan_entries,
    redundancy_table,
    search,
    situations,
)
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.cost.shipped import chosen_cost
from nitsum.errors import ConfigError
from nitsum.metrics.targets import Targets, default_targets, load_targets
from nitsum.tier import Tier, TierSet
from nitsum.workload.generate import generate
from nitsum.workload.items import WorkItem
from nitsum.workload.spec import MixSpec, load_mix, scaled

WINDOWS = 6
"""A workload without phases is looked at in this many equal parts."""
MAX_ROWS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a known shape such as Llama-3.1-70B, demo, or a checkpoint folder"
    )
    parser.add_argument("--machine", default="8xH100-80GB", help="GPUs (default: 8xH100-80GB)")
    parser.add_argument(
        "--cost",
        metavar="FILE",
        default="",
        help="measured steps, or `analytic` (default: those that come with Nitsum for this machine "
        "and shape; without, analytic)",
    )
    parser.add_argument("--workload", metavar="MIX", required=True, help="a mix: name or YAML file")
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies the mix's rates")
    parser.add_argument(
        "--targets",
        default="rule",
        help="rule (multiples of lone times), tiers (as served), or a targets file (default: rule)",
    )
    parser.add_argument("--tiers", default="", metavar="FILE", help="tiers, as serve takes them")
    parser.add_argument("--num-plans", type=int, default=4, help="plans to hold ready (default: 4)")
    for name in ("max_num_seqs", "max_batch_tokens", "max_mixed_tokens"):
        flag, default = f"--{name.replace('_', '-')}", by_device(name)
        parser.add_argument(flag, type=int, default=0, help=f"as serve has it (default: {default})")
    parser.add_argument("--longest-request", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the plans for serve --plans")


def run(args: argparse.Namespace) -> int:
    """Search, print, write."""
    started_s = time.perf_counter()
    site = _site(args)
    tiers = build_tiers(entries(args.tiers)) if args.tiers else build_tiers(())
    mix = scaled(load_mix(args.workload), args.rate)
    cases = situations(list(phases_of(mix, TierSet(tiers), _targets(args, site))))
    if not cases:
        raise ConfigError("The workload has no arrivals. Give it a higher rate or more time.")
    report = search(site, cases, args.num_plans)
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    print_report(report, site, console)
    console.print(f"searched in {time.perf_counter() - started_s:.1f} s")
    if args.out:
        write_plans(report, Path(args.out), args)
        console.print(
            f"wrote {args.out}: nitsum serve MODEL --ranks {site.machine.num_gpus} "
            f"--plans {args.out} --min-tp {report.min_tp}"
        )
    return 0


def _site(args: argparse.Namespace) -> PlanSite:
    shape, machine = shape_named(args.model), Machine.parse(args.machine)
    return PlanSite(
        shape=shape,
        machine=machine,
        cost=chosen_cost(args.cost, shape, machine, "bfloat16"),
        max_num_seqs=args.max_num_seqs,
        max_batch_tokens=args.max_batch_tokens,
        max_mixed_tokens=args.max_mixed_tokens,
        min_lane_tokens=args.longest_request,
    )


def _targets(args: argparse.Namespace, site: PlanSite) -> Targets | None:
    """None: what the tiers promise."""
    if args.targets == "tiers":
        return None
    if args.targets != "rule":
        return load_targets(Path(args.targets))
    degree = degrees_that_fit(site)[0]
    cost = site.cost_model(degree, site.machine.num_gpus)
    return default_targets(cost, degree, f"{args.model} on {args.machine}, TP{degree}")


# --- from a mix to loads --------------------------------------------------------------------------


def phases_of(
    mix: MixSpec, tiers: TierSet, targets: Targets | None
) -> Iterator[tuple[str, float, Load]]:
    """(name, share of time, load) of each phase, from the items it would send."""
    spans = list(_spans(mix))
    items = list(generate(mix))
    for name, start_s, end_s in spans:
        inside = [item for item in items if start_s <= item.at_s < end_s]
        load = _load(inside, end_s - start_s, tiers, targets)
        if load:
            yield name, (end_s - start_s) / mix.duration_s, load


def _spans(mix: MixSpec) -> Iterator[tuple[str, float, float]]:
    if not mix.phases:
        width = mix.duration_s / WINDOWS
        for i in range(WINDOWS):
            yield f"{i * width:.0f}-{(i + 1) * width:.0f} s", i * width, (i + 1) * width
        return
    ends = [*(phase.at_s for phase in mix.phases[1:]), mix.duration_s]
    for phase, end_s in zip(mix.phases, ends, strict=True):
        yield phase.name, phase.at_s, end_s


def _load(items: list[WorkItem], span_s: float, tiers: TierSet, targets: Targets | None) -> Load:
    by_tier: dict[str, list[tuple[int, int]]] = {}
    for item in items:
        by_tier.setdefault(item.tier, []).extend(_calls(item))
    return by_level(
        sum_up(
            tiers[name],
            [_sample(tiers[name], prompt, targets) for prompt, _ in calls],
            rate_per_s=len(calls) / span_s,
            output_tokens=sum(output for _, output in calls) / len(calls),
        )
        for name, calls in by_tier.items()
    )


def _calls(item: WorkItem) -> list[tuple[int, int]]:
    """(prompt, answer) of the item and of its chain's later calls, whose prefix is cached."""
    later = item.chain.calls[1:] if item.chain is not None else ()
    return [(item.num_prompt, item.num_output), *((c.num_new, c.num_output) for c in later)]


def _sample(tier: Tier, num_prompt: int, targets: Targets | None) -> Sample:
    if targets is None:
        return Sample(num_prompt, tier.ttft_s, tier.tpot_s, tier.deadline_s)
    return Sample(num_prompt, *targets.of(tier.name, num_prompt))


# --- telling --------------------------------------------------------------------------------------


def print_report(report: PlanReport, site: PlanSite, console: Console) -> None:
    """Plans beside static layouts, what the set brings, what it costs."""
    chosen = {plan.name for plan in report.chosen.plans}
    shown = [e for i, e in enumerate(report.entries) if i < MAX_ROWS or e.plan.name in chosen]
    console.print(
        _table(f"plans (each rank holds 1/{report.min_tp} of the weights)", shown, report, chosen)
    )
    console.print(
        _table(
            "static layouts (own shard only, freed memory is KV)",
            list(report.statics),
            report,
            set(),
        )
    )
    static = report.best_static
    best = report.entries[0]
    console.print(
        f"best set of {len(chosen)}: {report.set_value:.2f} requests/s in time over all situations;"
        f" best single plan {best.plan.name} {best.value:.2f};"
        f" best static {static.plan.name} {static.value:.2f}"
        f" ({_ratio(report.set_value, static.value)})"
    )
    console.print(_memory_line(report, site))
    console.print(
        "P99s are those of the heaviest situation in which the plan is not overloaded; they come "
        "from a queueing estimate, not from a run: check them with nitsum simulate.",
        style="dim",
    )


def _table(title: str, rows: list[Entry], report: PlanReport, chosen: set[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("plan", no_wrap=True)
    table.add_column("goodput/s", justify="right")
    tiers = _tiers(report)
    for tier in tiers:
        table.add_column(f"{tier}/s", justify="right")
        table.add_column("TTFT P99, TPOT", no_wrap=True)
    table.add_column("KV tokens", justify="right")
    table.add_column("KV lost", justify="right")
    table.add_column("binds", no_wrap=True)
    for entry in rows:
        mark = "* " if entry.plan.name in chosen else ""
        cells = [cell for tier in tiers for cell in _tier_cells(entry, tier, report)]
        table.add_row(
            mark + entry.plan.name,
            f"{entry.value:.2f}",
            *cells,
            f"{entry.kv_tokens:,}",
            f"{entry.redundancy_share:.1%}",
            _binds(entry),
        )
    return table


def _tiers(report: PlanReport) -> list[str]:
    """In order of urgency, every tier that some situation has."""
    levels = {load.tier: load.level for case in report.situations for load in case.load}
    return sorted(levels, key=lambda tier: levels[tier])


def _tier_cells(entry: Entry, tier: str, report: PlanReport) -> tuple[str, str]:
    scores = [
        (score, found, case.weight)
        for score, case in zip(entry.scores, report.situations, strict=True)
        for found in score.tiers
        if found.tier == tier
    ]
    weight = sum(case.weight for case in report.situations)
    goodput = sum(found.feasible_per_s * w for _, found, w in scores) / weight
    calm = [found for score, found, _ in scores if score.utilisation < 0.98]
    if not calm:
        return f"{goodput:.2f}", "overload"
    worst = max(calm, key=lambda found: found.ttft_p99_s)
    slowest = max(found.tpot_s for found in calm)
    return f"{goodput:.2f}", f"{_duration(worst.ttft_p99_s)}, {_duration(slowest)}"


def _duration(seconds: float) -> str:
    if seconds > 600.0:
        return "> 10 min"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1.0 else f"{seconds:.1f} s"


def _binds(entry: Entry) -> str:
    """What keeps it from serving more in the situations that fill it, else what would."""
    full = [score for score in entry.scores if score.utilisation > 0.9] or list(entry.scores)
    bounds = [tier.bound for score in full for tier in score.tiers if tier.bound]
    return max(sorted(set(bounds)), key=bounds.count, default="-")


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x" if theirs > 0 else "it serves nothing in time"


def _memory_line(report: PlanReport, site: PlanSite) -> str:
    rows = [
        f"TP{degree} {share:.0%}"
        for min_tp, degree, share in redundancy_table(site.shape, site.machine)
        if min_tp == report.min_tp
    ]
    return (
        f"memory of the set, per rank: buffers {report.buffer_bytes / (1 << 20):.0f} MiB "
        f"({report.buffer_share:.2%} of the device; from sizes, graphs are measured at start); "
        f"KV room lost to holding 1/{report.min_tp} of the weights, against a static layout of the "
        f"same degree: {', '.join(rows)}"
    )


def write_plans(report: PlanReport, path: Path, args: argparse.Namespace) -> None:
    """A YAML list that `serve --plans` reads; how it came about is a comment."""
    head = (
        f"# nitsum plan {args.model} --machine {args.machine} --workload {args.workload} "
        f"--rate {args.rate:g}\n# serve with --ranks {report.chosen.num_ranks} "
        f"--min-tp {report.min_tp}\n"
    )
    body = yaml.safe_dump(plan_entries(report.chosen), sort_keys=False, default_flow_style=None)
    path.write_text(head + body, encoding="utf-8")
