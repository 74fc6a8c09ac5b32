"""Served beside simulated, and the ratios: what the points come to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.goodput.points import Point, Points
from nitsum.bench.provenance import versions
from nitsum.cost.machines import Gpu, Machine

Figures = Mapping[str, float]
GOODPUT = "goodput_requests_per_s"
TIMES = ("priority_ttft_p99_s", "priority_tpot_p99_s")
COMPARED = (
    GOODPUT,
    "priority_attainment_share",
    "default_attainment_share",
    *TIMES,
    "busy_share",
)
OTHERS = ("flex_attainment_share", "batch_attainment_share", "priority_num_requests")
"""Of a point, published beside those compared."""
OF_RANKS = ("busy_share", "read_bytes_per_s", "flops_per_s")
STRICTNESS = {
    "": GOODPUT,
    "_half_targets": "goodput_at_0.5k_requests_per_s",
    "_double_targets": "goodput_at_2k_requests_per_s",
}
"""Goodput with targets of the first token that are half and double as long, by ending."""
LOADS = ("best", "saturated")
LIGHT_SHARE = 0.7
"""Of capacity: below it, priority requests are to be in time whatever else there is."""


def read(file: Points, folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Results by the name of their point; of a point served twice, the later folder's. Raises
    `ConfigError` for one that was served for another plan's point."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for point in file.points:
            path = folder / f"{point.name}.json"
            if path.is_file():
                found[point.name] = json.loads(path.read_text())
                file.check(point, found[point.name], path)
    return found


def show(
    file: Points, results: Mapping[str, dict[str, Any]], summary: Path | None, command: str
) -> None:
    """Print the table and the ratios, and keep all figures if they have a file."""
    served = {
        point.name: results[point.name]["figures"] for point in file.points if point.name in results
    }
    simulated = {point.name: point.simulated for point in file.points}
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(_table(file, served))
    ratios = {"served": ratios_of(file, served), "simulated": ratios_of(file, simulated)}
    for name in ratios["simulated"]:
        cells = (f"{who} {found[name]:.3f}" for who, found in ratios.items() if name in found)
        console.print(f"{name:56} {', '.join(cells)}")
    missing = [point.name for point in file.points if point.name not in served]
    if missing:
        console.print(f"not served: {', '.join(missing)}", style="dim")
    if summary is not None:
        content = _summary(file, served, results, command)
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(content, indent=1) + "\n")


def _table(file: Points, served: Mapping[str, Figures]) -> Table:
    table = Table("point", "side", "load/s", title="served (simulated)")
    for name in ("goodput/s", "priority met", "default met", "TTFT P99 ms", "TPOT P99 ms", "busy"):
        table.add_column(name, justify="right")
    for point in file.points:
        cells = (_cell(served.get(point.name, {}), point.simulated, name) for name in COMPARED)
        table.add_row(point.name, point.side.name, f"{point.load:.1f}", *cells)
    return table


def _cell(served: Figures, simulated: Figures, name: str) -> str:
    scale = 1e3 if name in TIMES else 1.0

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{scale * value:.3g}"

    return f"{shown(served.get(name))} ({shown(simulated.get(name))})"


# --- ratios --------------------------------------------------------------------------------------


def ratios_of(file: Points, found: Mapping[str, Figures]) -> dict[str, float]:
    """Those whose points are there. Goodput: ours over theirs, each at its own best load (`_peak`),
    both at 1.5 times saturation, and the smaller of the two; with stricter and looser targets, too,
    at the loads that are best with the usual ones. Times of priority requests: ours over
    those of the widest static layout that serves the same priority requests and nothing else.
    Busy shares, above saturation: the mean over ranks of ours, and of the best under `fcfs`. On
    GPUs ranks cannot tell what they wait for peers inside a step, and it counts as busy.
    """
    ratios = dict(_goodput_ratios(found)) | dict(_times(found)) | dict(_attained(file, found))
    return ratios | dict(_busy(found))


def _goodput_ratios(found: Mapping[str, Figures]) -> Iterator[tuple[str, float]]:
    for policy in ("fcfs", "priority", "nitsum"):
        name = f"goodput_ratio_best_static_{policy}"
        for ending, figure in STRICTNESS.items():
            peak = _ratio(found, figure, "ours_best", f"static_{policy}_best")
            above = _ratio(found, figure, "ours_saturated", f"static_{policy}_saturated")
            yield from _named((f"{name}_peak{ending}", peak), (f"{name}_saturated{ending}", above))
            if peak is not None and above is not None:
                yield f"{name}{ending}", min(peak, above)
    shifting = _ratio(found, GOODPUT, "ours_shifting", "static_nitsum_shifting")
    yield from _named(("goodput_ratio_best_static_nitsum_shifting", shifting))


def _times(found: Mapping[str, Figures]) -> Iterator[tuple[str, float]]:
    """At the worse of the loads, and at each."""
    for short, figure in (("ttft", TIMES[0]), ("tpot", TIMES[1])):
        by_load = {
            load: ratio
            for load in LOADS
            if (ratio := _ratio(found, figure, f"ours_{load}", f"alone_{load}")) is not None
        }
        for load, ratio in by_load.items():
            yield f"priority_p99_{short}_ratio_{load}", ratio
        if by_load:
            yield f"priority_p99_{short}_ratio", max(by_load.values())


def _attained(file: Points, found: Mapping[str, Figures]) -> Iterator[tuple[str, float]]:
    """Of priority requests under ours: at each load, and the least where they alone are under 70%
    of what the widest layout could serve of them."""
    shares = [
        (point, share)
        for point in file.points
        if point.side.adaptive
        and (share := found.get(point.name, {}).get("priority_attainment_share")) is not None
    ]
    for point, share in shares:
        yield f"priority_attainment_{point.name.removeprefix('ours_')}", share
    light = [
        share
        for point, share in shares
        if point.mix == "mixed" and point.load < LIGHT_SHARE * file.alone_capacity
    ]
    if light:
        yield "priority_attainment", min(light)


def _busy(found: Mapping[str, Figures]) -> Iterator[tuple[str, float]]:
    pairs = (("gpu_busy_share", "ours"), ("gpu_busy_share_static", "static_fcfs"))
    for name, side in pairs:
        yield from _named((name, found.get(f"{side}_saturated", {}).get("busy_share")))


def _ratio(found: Mapping[str, Figures], figure: str, ours: str, theirs: str) -> float | None:
    pair = found.get(ours, {}).get(figure), found.get(theirs, {}).get(figure)
    return pair[0] / pair[1] if pair[0] is not None and pair[1] else None


def _named(*pairs: tuple[str, float | None]) -> Iterator[tuple[str, float]]:
    for name, value in pairs:
        if value is not None:
            yield name, value


# --- the result ----------------------------------------------------------------------------------


def _summary(
    file: Points,
    served: Mapping[str, Figures],
    results: Mapping[str, dict[str, Any]],
    command: str,
) -> dict[str, Any]:
    """As results are published; what nobody served is a prediction and named so."""
    figures = ratios_of(file, served)
    simulated = ratios_of(file, {point.name: point.simulated for point in file.points})
    figures |= {f"sim_{name}": value for name, value in simulated.items()}
    gpu = Machine.parse(file.machine).gpu
    for point in file.points:
        figures |= dict(_of_point(point, served.get(point.name), gpu))
    figures["sim_saturation_requests_per_s"] = file.saturation_per_s
    figures["sim_alone_capacity_requests_per_s"] = file.alone_capacity
    used = [results[name] for name in served]
    commands = dict.fromkeys([file.command, *(each["command"] for each in used), command])
    return {
        "date": max((each["date"] for each in used), default=file.date),
        "command": "; ".join(commands),
        "versions": _versions(used) if used else versions(),
        "hardware": _all(each["hardware"] for each in used) or f"simulated {file.machine}",
        "notes": _notes(file),
        "figures": figures,
    }


def _versions(used: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(name for each in used for name in each["versions"])
    return {name: _all(each["versions"].get(name, "none") for each in used) for name in names}


def _all(words: Iterable[str]) -> str:
    """What was said on any of the machines that served, each once."""
    return " | ".join(dict.fromkeys(words))


def _of_point(point: Point, served: Figures | None, gpu: Gpu) -> Iterable[tuple[str, float]]:
    yield f"{point.name}_load_requests_per_s", point.load
    for name in (*COMPARED, *OTHERS):
        if name in point.simulated:
            yield f"sim_{point.name}_{name}", point.simulated[name]
        if served is not None and name in served:
            yield f"{point.name}_{name}", served[name]
    for name, value in (served or {}).items():
        rank, _, figure = name.partition("_")
        if name.startswith("rank") and figure in OF_RANKS:
            yield f"{point.name}_{name}", value
        if name.startswith("rank") and (peak := _peaks(gpu).get(figure)):
            share = figure.replace("_per_s", "_share_of_peak")
            yield f"{point.name}_{rank}_{share}", value / peak
    if served is not None and point.simulated.get(GOODPUT):
        error = point.simulated[GOODPUT] / served[GOODPUT] - 1.0 if served.get(GOODPUT) else None
        if error is not None:
            yield f"{point.name}_sim_error_goodput", error


def _peaks(gpu: Gpu) -> dict[str, float]:
    """What the vendor promises, by figure of a rank."""
    return {"read_bytes_per_s": gpu.memory_bytes_per_s, "flops_per_s": gpu.matmul_flops_per_s}


def _notes(file: Points) -> str:
    sides = ", ".join(f"{point.name}: {point.side.name}" for point in file.points)
    return (
        f"Arrivals of the first {file.warmup_s:g} s load but are not judged; what is not answered "
        f"{file.drain_s:g} s after the last arrival counts as missed. {sides}."
    )
