"""What layouts sustain by the analytic model, what changing them could gain, and held-out windows.

    python -m benchmarks.layout_gain --out FOLDER            # the table, as a result
    python -m benchmarks.layout_gain --windows FOLDER        # studies of windows nobody ran yet

A layout sustains the rate of one kind of requests (lengths and tier) of which 95% are in time, with
lanes that keep their own weight shard only. The gain of two kinds is over the best single layout,
as phases in turns, each at what its best layout sustains, in the shares that gain most: a ceiling
without queues, prices of switches or a controller.

The windows follow from a rule, not from results: trace ranges by their start, loads as a share of
what the best static layout sustains by the same model. FOLDER has the traces. Prints two studies
for `nitsum bench control`, written to `benchmarks/workloads/held_*.yaml`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from nitsum.bench.provenance import summary
from nitsum.control.gain import most_gain, sustained
from nitsum.control.load import Load, Sample, sum_up
from nitsum.control.planner import (
    PlanSite,
    buffer_bytes,
    degrees_that_fit,
    redundancy_table,
    static_scorer,
)
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.metrics.targets import Targets
from nitsum.plan import PlanSet
from nitsum.sim.system import Site, site_targets, uniform_plan
from nitsum.tier import DEFAULT_TIERS, TierSet
from nitsum.workload.lengths import lengths_named
from nitsum.workload.traces import read_trace, window

SETTINGS = (
    ("Llama-3.1-8B", "2xH100-80GB"),
    ("Llama-3.1-8B", "8xH100-80GB"),
    ("Llama-3.1-8B", "8xA100-80GB"),
    ("Qwen2.5-32B", "8xA100-80GB"),
    ("Qwen2.5-32B", "8xH100-80GB"),
    ("Llama-3.1-70B", "8xA100-80GB"),
    ("Llama-3.1-70B", "8xH100-80GB"),
)
MEMORY = (
    ("Llama-3.1-8B", "8xH100-80GB"),
    ("Llama-3.1-70B", "8xA100-80GB"),
    ("Llama-3.1-70B", "8xH200-141GB"),
    ("Llama-3.1-405B", "8xH200-141GB"),
    ("Llama-3.1-405B", "16xH100-80GB"),
    ("Llama-3.1-405B", "16xH200-141GB"),
)
LENGTHS = ("azure_conversation", "azure_code", "arxiv_summarisation", "mooncake_conversation")
TIERS = ("priority", "default", "batch")
FACTORS = (1.0, 0.5)
"""Of the times to the first token that the target rule gives."""
NUM_DRAWS = 400
WORK = Path(__file__).parent / "workloads"

Pairs = Sequence[tuple[int, int]]
"""(prompt, answer) tokens."""


@dataclass(frozen=True)
class Setting:
    """A model on a machine, and what requests are held to there."""

    model: str
    machine: Machine
    targets: Targets

    @classmethod
    def of(cls, model: str, machine: str, factor: float = 1.0) -> Setting:
        known = Machine.parse(machine)
        site = Site(model=model, shape=shape_named(model), machine=known)
        return cls(model, known, site_targets(site).with_k(factor))

    def sustained(self, pairs: Pairs, tiers: dict[str, float]) -> dict[int, float]:
        """Requests per second by degree of static uniform lanes."""
        site = PlanSite(shape=shape_named(self.model), machine=self.machine)
        load = self._load(pairs, tiers)
        found: dict[int, float] = {}
        for degree in degrees_that_fit(site):
            plan = uniform_plan(self.machine.num_gpus, degree)
            found[degree] = sustained(static_scorer(site, degree), plan, load)
        return found

    def _load(self, pairs: Pairs, tiers: dict[str, float]) -> Load:
        """One request per second in all."""
        known, total = TierSet(DEFAULT_TIERS), sum(tiers.values())
        mean_output = sum(output for _, output in pairs) / len(pairs)
        return tuple(
            sum_up(
                known[tier],
                [Sample(prompt, *self.targets.of(tier, prompt)) for prompt, _ in pairs],
                rate_per_s=weight / total,
                output_tokens=mean_output,
            )
            for tier, weight in tiers.items()
        )


def drawn(lengths: str) -> Pairs:
    table, draw = lengths_named(lengths), random.Random(1)
    return [(table.prompt.draw(draw), table.output.draw(draw)) for _ in range(NUM_DRAWS)]


# --- the table ------------------------------------------------------------------------------------


def table(settings: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Figures by name, printed as they come."""
    figures: dict[str, float] = {}
    for model, machine in settings:
        for factor in FACTORS:
            setting = Setting.of(model, machine, factor)
            word = f"{model}_{machine}_k{factor:g}".replace("-", "_").replace(".", "p").lower()
            print(f"\n{model} on {machine}, targets of the first token x {factor:g}")
            figures |= _rows(setting, word)
    return figures


def _rows(setting: Setting, word: str) -> dict[str, float]:
    rates = {
        (lengths, tier): setting.sustained(drawn(lengths), {tier: 1.0})
        for lengths in LENGTHS
        for tier in TIERS
    }
    found: dict[str, float] = {}
    for (lengths, tier), by_degree in rates.items():
        cells = ", ".join(f"TP{d} {rate:.2f}" for d, rate in by_degree.items())
        print(f"  {lengths}, {tier}: {cells}")
        for degree, rate in by_degree.items():
            found[f"{word}_{lengths}_{tier}_tp{degree}_requests_per_s"] = rate
    for urgent, patient in (("priority", "default"), ("priority", "batch"), ("default", "batch")):
        gains = {
            (a, b): _gain(rates[a, urgent], rates[b, patient]) for a in LENGTHS for b in LENGTHS
        }
        first, second = max(gains, key=lambda pair: gains[pair])
        best = gains[first, second]
        print(f"  at most {best:.3f}x: {first}, {urgent} and {second}, {patient}")
        found[f"{word}_{urgent}_{patient}_most_gain"] = best
    return found


def _gain(first: dict[int, float], second: dict[int, float]) -> float:
    """1 where one of the two cannot be served at all: there is nothing to change between."""
    if not max(first.values()) or not max(second.values()):
        return 1.0
    return most_gain([*first.values()], [*second.values()])


# --- memory ---------------------------------------------------------------------------------------


def memory(model: str, machine: str) -> dict[str, float]:
    """What holding every layout costs: buffers of all groups, and KV room, by min_tp and degree."""
    known = Machine.parse(machine)
    site = PlanSite(shape=shape_named(model), machine=known)
    word = f"{model}_{machine}".replace("-", "_").replace(".", "p").lower()
    degrees = degrees_that_fit(site)
    plans = tuple(uniform_plan(known.num_gpus, degree) for degree in degrees)
    num_bytes = buffer_bytes(site, PlanSet(known.num_gpus, plans, plans[0].name))
    found = {f"{word}_buffer_share": num_bytes / known.gpu.memory_bytes}
    print(f"\n{model} on {machine}: buffers {found[f'{word}_buffer_share']:.2%} of the device")
    for min_tp, degree, share in redundancy_table(site.shape, known):
        if min_tp in degrees:
            print(f"  1/{min_tp} of the weights, TP{degree}: {share:.1%} of the KV room lost")
            found[f"{word}_min_tp{min_tp}_tp{degree}_redundancy_share_of_kv"] = share
    return found


# --- held-out windows -----------------------------------------------------------------------------

TRACE_LOAD = 0.9
"""Of what the best static layout sustains, as the mean rate of a trace's window."""
FLIP_LOAD = 1.05
"""The same for a phase of a flip: below saturation no layout is late."""
PHASES_S = (0.0, 110.0, 160.0, 220.0)
"""Urgent, patient, urgent, patient; the first 60 s are warm-up."""
FLIP_S = 270.0
SWITCH_COSTS_S = [0.001, 0.01, 0.1, 1]
ARTICLE = {
    "loads": [1.5, 2.5, 3.5, 5], "duration_s": 1030, "lengths": "azure_conversation"
}  # fmt: skip
"""The published setting: long enough for a P99 of 1,000 priority requests at 3.5/s."""
TRACES = (
    ("azure_code", "azure_2023_code.csv", 2100, 900, 16384),
    ("azure_conversation", "azure_2023_conv.csv", 600, 900, 16384),
    ("mooncake_conversation", "mooncake_conversation.jsonl", 1800, 900, 65536),
)
"""(name, file, start in the trace, seconds of the window, longest request)."""
FLIPS = (
    ("flip_summaries_code", "arxiv_summarisation", "azure_code"),
    ("flip_chat_code", "azure_conversation", "azure_code"),
    ("flip_summaries_chat", "arxiv_summarisation", "azure_conversation"),
)
"""(name, lengths of the urgent phase, of the patient one)."""


def trace_study(data: Path) -> dict[str, Any]:
    """30% priority, 70% default, as the published setting has it."""
    setting, tiers = Setting.of("Llama-3.1-70B", "8xA100-80GB"), {"priority": 3.0, "default": 7.0}
    windows: list[dict[str, Any]] = []
    for name, file, start_s, length_s, limit in TRACES:
        rows = list(window(read_trace(data / file), start_s, 300.0))
        pairs = [(r.num_prompt, r.num_output) for r in islice(rows, NUM_DRAWS)]
        best = max(setting.sustained(pairs, tiers).values())
        speed = round(TRACE_LOAD * best / (len(rows) / 300.0), 3)
        stream = {
            "name": "requests", "trace": file, "start_s": start_s, "speed": speed, "tiers": tiers
        }  # fmt: skip
        mix = {
            "name": name, "duration_s": length_s, "max_total_tokens": limit, "streams": [stream]
        }  # fmt: skip
        windows.append({"mix": mix})
    return _study(setting, ["TP8", "2xTP4"], windows) | {"article": ARTICLE}


def flip_study() -> dict[str, Any]:
    """Urgent requests in one phase, patient ones in the next."""
    setting = Setting.of("Llama-3.1-8B", "2xH100-80GB")
    windows = [
        _flip(setting, name, urgent, patient, seed)
        for seed, (name, urgent, patient) in enumerate(FLIPS, start=301)
    ]
    return _study(setting, ["TP2", "2xTP1"], windows)


def _flip(setting: Setting, name: str, urgent: str, patient: str, seed: int) -> dict[str, Any]:
    streams = [
        _stream(setting, "urgent", urgent, "priority"),
        _stream(setting, "patient", patient, "default"),
    ]
    phases = [
        {"name": f"{word} {number}", "at_s": at_s, "rates": {other: 0.0}}
        for number, (at_s, word, other) in enumerate(
            zip(PHASES_S, ("urgent", "patient") * 2, ("patient", "urgent") * 2, strict=True)
        )
    ]
    mix = {
        "name": name, "duration_s": FLIP_S, "seed": seed, "max_total_tokens": 8192,
        "streams": streams, "phases": phases,
    }  # fmt: skip
    return {"shifting": True, "mix": mix}


def _stream(setting: Setting, name: str, lengths: str, tier: str) -> dict[str, Any]:
    best = max(setting.sustained(drawn(lengths), {tier: 1.0}).values())
    rate = round(FLIP_LOAD * best, 2)
    return {"name": name, "lengths": lengths, "tiers": {tier: 1}, "rate_per_s": rate}


def _study(setting: Setting, plans: list[str], windows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": setting.model,
        "machine": str(setting.machine),
        "plans": plans,
        "warmup_s": 60,
        "drain_s": 60,
        "switch_costs_s": SWITCH_COSTS_S,
        "windows": windows,
    }


class _Plain(yaml.SafeDumper):
    """Writes everything out, also what occurs twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def write_study(name: str, study: dict[str, Any]) -> None:
    head = "# Held out: written by `python -m benchmarks.layout_gain --windows`, before any run.\n"
    text = yaml.dump(study, Dumper=_Plain, sort_keys=False, default_flow_style=None, width=100)
    (WORK / name).write_text(head + text, encoding="utf-8")
    print(head + text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write summary.json here")
    parser.add_argument("--windows", type=Path, metavar="FOLDER", help="folder of the traces")
    args = parser.parse_args()
    if args.windows is not None:
        write_study("held_traces.yaml", trace_study(args.windows))
        write_study("held_flips.yaml", flip_study())
        return
    figures = table(SETTINGS)
    for model, machine in MEMORY:
        figures |= memory(model, machine)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        notes = "By the analytic cost model; 95% in time; static lanes with their own shard only."
        content = summary(figures, notes) | {
            "hardware": "analytic: the machines that are named",
            "command": f"python -m benchmarks.layout_gain --out {args.out}",
        }
        (args.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
