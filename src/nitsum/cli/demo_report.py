"""What the demo shows of its switches and its tiers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.metrics.switches import StreamPause, pauses


def print_switch(console: Console, report: dict[str, Any]) -> None:
    """One switch, as the server reported it: what moved, and how long each phase took."""
    waves = report["waves"]
    title = f"\n[bold reverse] {report['from_plan']} -> {report['to_plan']} [/]"
    if not waves:
        console.print(f"{title} nothing had to move: no lane that is in use was given up\n")
        return
    moved = sum(wave["num_requests"] for wave in waves)
    cached = sum(wave["num_cached_blocks"] for wave in waves)
    megabytes = sum(wave["bytes_moved"] for wave in waves) / 1e6
    in_place = sum(wave["units_in_place"] for wave in waves)
    phases = ", ".join(
        f"{name} {1e3 * sum(wave[f'{name}_s'] for wave in waves):.0f} ms"
        for name in ("propose", "precopy", "cutover")
    )
    console.print(
        f"{title} {moved} streams and {cached} cached blocks moved in {len(waves)} waves: "
        f"{megabytes:.1f} MB copied, {in_place} units stayed in place\n"
        f"         {report['duration_s'] * 1e3:.0f} ms in all: {phases}\n"
    )


def switch_table(recorder: Recorder) -> Table:
    """Added pause by switch: a stream's longest gap across it, less its usual gap."""
    found, _ = pauses(recorder.switches, recorder.requests.values())
    by_switch: dict[str, list[StreamPause]] = defaultdict(list)
    for pause in found:
        by_switch[pause.op_id].append(pause)
    table = Table(title="Pause that a switch added to the streams across it")
    table.add_column("switch", no_wrap=True)
    for name in ("streams", "MB moved", "usual gap", "added P50", "added max"):
        table.add_column(name, justify="right")
    for switch in recorder.switches:
        across = by_switch[switch.op_id]
        added = sorted(pause.added_s for pause in across)
        usual = sorted(pause.median_gap_s for pause in across)
        table.add_row(
            f"{switch.from_plan} -> {switch.to_plan}",
            str(len(across)),
            f"{switch.bytes_moved / 1e6:.1f}",
            _milliseconds(usual[len(usual) // 2 :]),
            _milliseconds(added[len(added) // 2 :]),
            _milliseconds(added[-1:]),
        )
    return table


def print_tiers(console: Console, recorder: Recorder) -> None:
    """By tier: how many, how fast, and whether the tier's targets were met."""
    table = Table(title="By tier (medians)")
    table.add_column("tier")
    for name in ("answers", "tokens", "in queue", "first token", "per token", "paused", "cached"):
        table.add_column(name, justify="right")
    by_tier: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in recorder.requests.values():
        by_tier[record.tier_served].append(record)
    for tier, records in by_tier.items():
        table.add_row(tier, *_tier_row(records))
    console.print(table)


def _tier_row(records: list[RequestRecord]) -> list[str]:
    answered = [record for record in records if record.is_answered]
    queued = [r.started_s - r.arrival_s for r in answered if r.started_s is not None]
    return [
        str(len(answered)),
        str(sum(record.num_output for record in answered)),
        _median(queued),
        _median([r.ttft_s for r in answered if r.ttft_s is not None]),
        _median([r.tpot_s for r in answered if r.tpot_s is not None]),
        str(sum(record.num_displaced for record in records)),
        str(sum(record.num_cached for record in records)),
    ]


def _median(values: list[float]) -> str:
    ordered = sorted(values)
    return _milliseconds(ordered[len(ordered) // 2 :])


def _milliseconds(values: list[float]) -> str:
    """The first of `values`, `-` without any; from ten seconds on, in seconds."""
    if not values:
        return "-"
    return f"{1e3 * values[0]:.0f} ms" if values[0] < 10.0 else f"{values[0]:.1f} s"
