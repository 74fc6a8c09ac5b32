"""How far the scores that plans are chosen by lie from what the simulator serves.

    python -m benchmarks.score_error [--out FOLDER]      # 3 minutes of one core, compiled
    python -m benchmarks.score_error --model Llama-3.1-70B --machine 8xA100-80GB --degrees 8,4

Static layouts under one kind of requests (lengths and tier), at shares of the rate of which the
score says that 95% are in time. `predicted` is that share at that rate by the score, `simulated`
by the scheduler in virtual time on the same requests. What decides is the difference of two
layouts under one load: `wrong` counts the pairs in which the score prefers by more than the
controller's margin the layout that is worse in simulation, and by how much it is worse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nitsum.bench.provenance import summary
from nitsum.cli.plan import phases_of
from nitsum.control.controller import Rules
from nitsum.control.gain import sustained
from nitsum.control.load import Load, scaled
from nitsum.control.planner import PlanSite, static_scorer
from nitsum.control.score import Scorer
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.metrics.goodput import arrival_window, judged, met
from nitsum.metrics.targets import Targets, held_to
from nitsum.plan import Plan
from nitsum.sim.run import Options, simulate
from nitsum.sim.system import Site, site_targets, static_system, uniform_plan
from nitsum.tier import TierSet
from nitsum.workload.generate import generate
from nitsum.workload.spec import MixSpec, StreamSpec

KINDS = (
    "azure_conversation:priority",
    "azure_conversation:default",
    "azure_code:default",
    "arxiv_summarisation:priority",
    "arxiv_summarisation:default",
)
SHARES = (0.6, 0.8, 0.95, 1.1, 1.3, 1.6)
WARMUP_S, JUDGED_S, DRAIN_S = 20.0, 60.0, 40.0
MOST_TOKENS = 8192
SEED = 977


@dataclass(frozen=True)
class Setting:
    """The machine, as the planner and as the simulator see it."""

    site: Site
    targets: Targets
    tiers: TierSet
    scorers: dict[str, Scorer]
    plans: list[Plan]

    @classmethod
    def make(cls, model: str, machine_name: str, degrees: Sequence[int]) -> Setting:
        shape, machine = shape_named(model), Machine.parse(machine_name)
        site = Site(model=model, shape=shape, machine=machine)
        targets = site_targets(site)
        site = replace(site, tiers=held_to(site.tiers, targets))
        planned = PlanSite(shape=shape, machine=machine)
        plans = [uniform_plan(machine.num_gpus, degree) for degree in degrees]
        scorers = {
            plan.name: static_scorer(planned, degree)
            for plan, degree in zip(plans, degrees, strict=True)
        }
        return cls(site, targets, TierSet(site.tiers), scorers, plans)


def mix_of(lengths: str, tier: str, rate_per_s: float, duration_s: float) -> MixSpec:
    stream = StreamSpec(name="all", lengths=lengths, rate_per_s=rate_per_s, tiers={tier: 1.0})
    return MixSpec(
        name=lengths,
        duration_s=duration_s,
        streams=(stream,),
        seed=SEED,
        max_total_tokens=MOST_TOKENS,
    )


def load_of(setting: Setting, lengths: str, tier: str) -> Load:
    """One request a second, of many, as if all were known exactly."""
    mix = mix_of(lengths, tier, 50.0, 60.0)
    _, _, load = next(phases_of(mix, setting.tiers, setting.targets))
    return tuple(replace(each, rate_per_s=1.0) for each in load)


def simulated_share(
    setting: Setting, plan: Plan, lengths: str, tier: str, rate_per_s: float
) -> float:
    mix = mix_of(lengths, tier, rate_per_s, WARMUP_S + JUDGED_S)
    system = static_system(setting.site, plan, "nitsum")
    options = Options(drain_s=DRAIN_S)
    result = simulate(system, list(generate(mix)), targets=setting.targets, options=options)
    records = list(result.recorder.requests.values())
    found = judged(records, arrival_window(records, WARMUP_S))
    return sum(met(record, setting.targets.of_record(record)) for record in found) / len(found)


@dataclass(frozen=True)
class Point:
    kind: str
    rate_per_s: float
    predicted: dict[str, float]
    simulated: dict[str, float]

    def regret(self, margin: float) -> float:
        """Share of the requests lost by the layout that the score prefers."""
        best = max(self.predicted, key=lambda plan: self.predicted[plan])
        for plan, share in self.predicted.items():
            if plan != best and self.predicted[best] > share * (1.0 + margin):
                return max(0.0, self.simulated[plan] - self.simulated[best])
        return 0.0


def points(setting: Setting, kinds: Sequence[str]) -> Iterator[Point]:
    for kind in kinds:
        lengths, tier = kind.split(":")
        load = load_of(setting, lengths, tier)
        most = max(sustained(setting.scorers[p.name], p, load) for p in setting.plans)
        for share in SHARES:
            rate = share * most
            asked = scaled(load, rate)
            yield Point(
                kind,
                rate,
                {
                    p.name: setting.scorers[p.name].score(p, asked).feasible_per_s / rate
                    for p in setting.plans
                },
                {p.name: simulated_share(setting, p, lengths, tier, rate) for p in setting.plans},
            )


def figures(found: list[Point]) -> dict[str, float]:
    margin = Rules().margin
    errors = [
        (point.predicted[plan] - point.simulated[plan], plan)
        for point in found
        for plan in point.simulated
    ]
    result = {
        "score_error_mean_abs": sum(abs(error) for error, _ in errors) / len(errors),
        "score_error_max_abs": max(abs(error) for error, _ in errors),
        "wrong_num": float(sum(point.regret(margin) > 0.0 for point in found)),
        "wrong_max_loss_share": max(point.regret(margin) for point in found),
        "num_pairs": float(len(found)),
    }
    for name in found[0].simulated:
        own = [error for error, plan in errors if plan == name]
        result[f"score_bias_{name.lower()}"] = sum(own) / len(own)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for points.json and summary.json")
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--machine", default="2xH100-80GB")
    parser.add_argument(
        "--degrees", default="2,1", help="of uniform layouts (default: %(default)s)"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="LENGTHS:TIER,...")
    args = parser.parse_args()
    degrees = [int(degree) for degree in args.degrees.split(",")]
    setting, found = Setting.make(args.model, args.machine, degrees), []
    for point in points(setting, args.kinds.split(",")):
        found.append(point)
        shares = "  ".join(
            f"{plan} {point.predicted[plan]:6.1%} ({point.simulated[plan]:6.1%})"
            for plan in point.predicted
        )
        print(f"{point.kind:30s} {point.rate_per_s:6.2f}/s  {shares}", flush=True)
    result = figures(found)
    print("\n".join(f"{name}: {value:.4g}" for name, value in result.items()))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        told = [vars(point) for point in found]
        (args.out / "points.json").write_text(json.dumps(told, indent=1) + "\n")
        notes = f"{args.model} on {args.machine}, static layouts, one kind of requests at a time."
        text = json.dumps(summary(result, notes), indent=1)
        (args.out / "summary.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
