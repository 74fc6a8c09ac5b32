"""How long deciding takes: one step of a busy lane, and taking requests in.

decide_ms_1000w_512r    median of `LaneScheduler.compose` with 1,000 waiting, 512 running
admit_per_s             requests taken in and routed by one `Core`, hashes given
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from nitsum.clock import VirtualClock
from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import SHAPES
from nitsum.engine.core import Core
from nitsum.engine.fake_executor import FakeExecutor
from nitsum.events import NullSink
from nitsum.garbage import collect_when_told
from nitsum.kv.cache import ArenaShape
from nitsum.plan import PlanSet, parse_plan
from nitsum.request import Request, SamplingParams
from nitsum.tier import DEFAULT_TIERS

BLOCK_TOKENS = 16
PROMPT_TOKENS = 512
TIERS = ("priority", "default", "flex", "batch")


def make_core(plan: str, num_ranks: int, max_num_seqs: int = 512) -> Core:
    """A core of an 8B model on H100s, without workers, and with queues that are not in the way."""
    shape = SHAPES["Llama-3.1-8B"]
    plans = PlanSet(num_ranks, (parse_plan(plan, num_ranks),), plan)
    roomy = {"max_queue_requests": 1 << 30, "max_queue_tokens": 1 << 40, "over_capacity": "queue"}
    config = EngineConfig(
        model="none",
        plans=plans,
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=8192,
        tiers=tuple(replace(tier, **roomy) for tier in DEFAULT_TIERS),
    )
    arena = ArenaShape(
        num_ranks=num_ranks,
        num_units=1 << 16,
        units_per_block=plans.max_tp,
        block_tokens=BLOCK_TOKENS,
        min_degree=plans.degrees[0],
    )
    cost = AnalyticCost(shape, Machine.parse(f"{num_ranks}xH100"), max_tp=plans.max_tp)
    clock = VirtualClock()
    return Core(config, arena, FakeExecutor(arena), clock, NullSink(), cost=cost)


def make_requests(count: int, num_hashes: int = PROMPT_TOKENS // BLOCK_TOKENS) -> list[Request]:
    """Prompts of 512 tokens of 16 tenants in all tiers, hashes given."""
    prompt = [1] * PROMPT_TOKENS
    sampling = SamplingParams(max_tokens=256)
    return [
        Request(
            f"r{i}",
            prompt,
            sampling,
            tier=TIERS[i % 4],
            tier_asked=TIERS[i % 4],
            tenant=f"tenant-{i % 16}",
            prefix_hashes=[i * 1000 + block for block in range(num_hashes)],
        )
        for i in range(count)
    ]


def decide_ms(num_waiting: int = 1000, num_running: int = 512, num_steps: int = 200) -> float:
    """Median milliseconds of composing one step."""
    core = make_core("TP1", 1, num_running)
    for request in make_requests(num_waiting + num_running):
        core.submit(request)
    scheduler = next(iter(core.generation.loops.values())).scheduler
    now, times = 0.0, list[float]()
    warm_up = 20 * PROMPT_TOKENS * num_running // 8192
    for step in range(warm_up + num_steps):
        now += 0.015
        started_s = time.process_time()
        composed = scheduler.compose(1 << 20, now)
        if step >= warm_up:
            times.append(time.process_time() - started_s)
        for sequence, _, num_tokens, samples in composed.chunks:
            sequence.num_dispatched += num_tokens
            if samples:
                sequence.tokens.append(7)
                sequence.first_token_s = sequence.first_token_s or now
                if sequence.num_output >= 250:
                    del sequence.tokens[sequence.num_prompt :]
                    sequence.num_dispatched = sequence.num_prompt - 1
    assert scheduler.num_running == num_running
    return 1000 * statistics.median(times)


def admit_per_s(count: int = 20_000, plan: str = "2xTP2", num_ranks: int = 4) -> float:
    """Requests a second that are checked, promised or not, routed and queued."""
    core = make_core(plan, num_ranks)
    requests = make_requests(count)
    started_s = time.process_time()
    for request in requests:
        core.submit(request)
    seconds = time.process_time() - started_s
    assert len(core.sequences) == count
    return count / seconds


def main() -> None:
    collect_when_told()  # as the engine's process does
    for num_waiting, num_running in ((1000, 128), (1000, 256), (1000, 512), (4000, 512)):
        print(
            f"decide_ms_{num_waiting}w_{num_running}r {decide_ms(num_waiting, num_running):.3f}",
            flush=True,
        )
    for plan, num_ranks in (("TP1", 1), ("2xTP2", 4), ("4xTP1", 4), ("8xTP1", 8)):
        print(f"admit_per_s_{plan} {admit_per_s(20_000, plan, num_ranks):.0f}", flush=True)


if __name__ == "__main__":
    main()
