"""How long the online choice of plans takes for a fleet: `plan_ms_128gpus`.

python -m nitsum.bench.planning
"""

from __future__ import annotations

import json
import random
import statistics
import time

from nitsum.bench.provenance import summary
from nitsum.control.load import Load, by_level, sum_up, tier_sample
from nitsum.control.score import Limits, Scorer
from nitsum.control.search import Fleet
from nitsum.control.steps import StepTimes
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.plan import default_plans
from nitsum.tier import DEFAULT_TIERS

NODE_RANKS = 8
MODEL, MACHINE = "Llama-3.1-8B", "8xH100-80GB"
NUM_LOADS = 300


def fleet_of(num_gpus: int) -> Fleet:
    """Nodes of eight GPUs with the default plans, on the analytic model."""
    cost = AnalyticCost(shape_named(MODEL), Machine.parse(MACHINE))
    scorer = Scorer(StepTimes(cost, cost.degrees), Limits(256, 2048, cost.kv_tokens))
    return Fleet(scorer, default_plans(NODE_RANKS).plans, num_gpus // NODE_RANKS)


def random_load(draw: random.Random, per_gpu: float, num_gpus: int) -> Load:
    """All four tiers, from idle to beyond what the machines can do."""
    return by_level(
        sum_up(
            tier,
            [tier_sample(tier, max(16, int(draw.lognormvariate(6.5, 1.0)))) for _ in range(64)],
            rate_per_s=draw.uniform(0.0, per_gpu) * num_gpus,
            output_tokens=draw.uniform(50, 400),
        )
        for tier in DEFAULT_TIERS
    )


def plan_times_s(num_gpus: int, num_loads: int = NUM_LOADS, seed: int = 0) -> list[float]:
    """Seconds of this process's own time for each choice; every load is new to the scorer."""
    fleet, draw = fleet_of(num_gpus), random.Random(seed)
    loads = [random_load(draw, 12.0, num_gpus) for _ in range(num_loads)]
    times: list[float] = []
    for load in loads:
        started_s = time.process_time()
        fleet.choose(load)
        times.append(time.process_time() - started_s)
    return times


def figures() -> dict[str, float]:
    times = plan_times_s(128)
    return {
        "plan_ms_128gpus": statistics.mean(times) * 1e3,
        "plan_p99_ms_128gpus": statistics.quantiles(times, n=100)[98] * 1e3,
    }


if __name__ == "__main__":
    notes = f"{MODEL}, nodes of {MACHINE}, 4 tiers, {NUM_LOADS} random loads, process time"
    print(json.dumps(summary(figures(), notes), indent=1))
