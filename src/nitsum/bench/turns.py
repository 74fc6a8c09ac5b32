"""How long the engine's turns are while a plan is switched: its Python alone, on no workers.

64 requests of 2,000 tokens decode in an arena full of cached prefixes. Workers take no time: what
is under way ends a turn later. Printed for each switch, in milliseconds of processor time:

    fill        the median and the longest turn before requests are cut over, and their number
    cut over    the turn that cuts over and composes the first steps of the new lanes
    after       the longest turn after it
    ordinary    the median turn before the switch
    us/block    all turns of the switch less as many ordinary ones, cached prefixes and the end of
                the old lanes' cache included, for each block of the requests
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

from nitsum.clock import VirtualClock
from nitsum.config import EngineConfig
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import SHAPES
from nitsum.engine.core import Core
from nitsum.events import NullSink
from nitsum.kv.cache import ArenaShape
from nitsum.messages import FromWorker, Move, MoveDone, Ready, Step, StepDone, ToWorker, encode
from nitsum.plan import PlanSet, parse_plan
from nitsum.request import Request, SamplingParams

NUM_REQUESTS = 64
NUM_TOKENS = 2000
BLOCK_TOKENS = 16
ROOM = 4
"""Blocks the arenas hold for each block of the running requests; the rest is cached."""


class InstantExecutor:
    """Workers that have done everything by the next poll; messages are encoded all the same."""

    def __init__(self, num_ranks: int) -> None:
        self._sent = [0] * num_ranks
        self._replies: list[FromWorker] = []

    def start(self) -> list[Ready]:
        return []

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        encode(message)
        leader = -1
        for rank in ranks:
            self._sent[rank] += 1
            leader = rank if leader < 0 else leader
        if isinstance(message, Step):
            tokens = [7] * sum(work.samples for work in message.work)
            self._replies.append(StepDone(message.step_id, leader, tokens, 0.0))
        elif isinstance(message, Move):
            self._replies.append(MoveDone(message.move_id, leader, 0.0, 0))

    def num_sent(self, rank: int) -> int:
        return self._sent[rank]

    def poll(self, timeout_s: float) -> list[FromWorker]:
        replies, self._replies = self._replies, []
        return replies

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class SwitchTurns:
    """Milliseconds of processor time; see the module."""

    median_fill_ms: float
    fill_ms: float
    num_fill_turns: int
    cut_over_ms: float
    after_ms: float
    num_after_turns: int
    num_waves: int
    ordinary_ms: float
    us_per_block: float

    def __str__(self) -> str:
        return (
            f"fill {self.median_fill_ms:.2f} to {self.fill_ms:.2f} ms "
            f"({self.num_fill_turns} turns), cut over "
            f"{self.cut_over_ms:.2f}, after {self.after_ms:.2f} ({self.num_after_turns} turns), "
            f"ordinary {self.ordinary_ms:.2f}, {self.us_per_block:.1f} us/block, "
            f"{self.num_waves} wave(s)"
        )


def busy_core(plans: tuple[str, ...], num_ranks: int) -> Core:
    """A core in the first of its plans, whose arena is full of running and cached requests."""
    plan_set = PlanSet(num_ranks, tuple(parse_plan(p, num_ranks) for p in plans), plans[0])
    num_blocks = ROOM * NUM_REQUESTS * (NUM_TOKENS // BLOCK_TOKENS + 1)
    config = EngineConfig(
        model="none",
        plans=plan_set,
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=NUM_REQUESTS,
        max_batch_tokens=8192,
        policy="fcfs",
    )
    arena = ArenaShape(
        num_ranks=num_ranks,
        num_units=num_blocks * plan_set.max_tp // num_ranks,
        units_per_block=plan_set.max_tp,
        block_tokens=BLOCK_TOKENS,
        min_degree=plan_set.degrees[0],
    )
    cost = AnalyticCost(
        SHAPES["Llama-3.1-8B"], Machine.parse(f"{num_ranks}xH100"), max_tp=plan_set.max_tp
    )
    core = Core(config, arena, InstantExecutor(num_ranks), VirtualClock(), NullSink(), cost=cost)
    _fill(core)
    return core


def _fill(core: Core) -> None:
    for index in range(4 * NUM_REQUESTS):
        core.submit(_request(f"cached{index}", 1000 * index, 1))
    while core.sequences:
        core.turn()
    for index in range(NUM_REQUESTS):
        core.submit(_request(f"running{index}", -1 - 1000 * index, 1 << 15))
    while any(sequence.num_output < 4 for sequence in core.sequences.values()):
        core.turn()


def _request(request_id: str, first_token: int, max_tokens: int) -> Request:
    prompt = list(range(first_token, first_token + NUM_TOKENS))
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens))


def time_switch(core: Core, plan: str) -> SwitchTurns:
    """Go to `plan` and take the time of every turn."""
    ordinary_ms = statistics.median(_turn_ms(core) for _ in range(30))
    gc.collect()
    switcher = core.generation.switcher
    num_blocks = sum(len(table.blocks) for table in core.generation.kv.tables.values())
    core.switch("bench", plan)
    switch = switcher.current
    assert switch is not None
    times: list[tuple[float, bool]] = []
    while switcher.current is not None:
        seconds = _turn_ms(core)
        times.append((seconds, switch.is_open))
    cut = next(index for index, (_, is_open) in enumerate(times) if is_open)
    total_ms = sum(ms for ms, _ in times) - ordinary_ms * len(times)
    return SwitchTurns(
        median_fill_ms=statistics.median([ms for ms, _ in times[:cut]] or [0.0]),
        fill_ms=max((ms for ms, _ in times[:cut]), default=0.0),
        num_fill_turns=cut,
        cut_over_ms=times[cut][0],
        after_ms=max((ms for ms, _ in times[cut + 1 :]), default=0.0),
        num_after_turns=len(times) - cut - 1,
        num_waves=sum(wave.num_requests > 0 for wave in switch.waves),
        ordinary_ms=ordinary_ms,
        us_per_block=1e3 * total_ms / num_blocks,
    )


def _turn_ms(core: Core) -> float:
    started_s = time.process_time()
    core.turn()
    return 1e3 * (time.process_time() - started_s)


def main() -> None:
    gc.disable()  # full collections are rare in the engine's process, too
    for num_ranks, plans in ((2, ("2xTP1", "TP2")), (8, ("8xTP1", "2xTP4")), (8, ("4xTP2", "TP8"))):
        core = busy_core(plans, num_ranks)
        for plan in (*plans[1:], plans[0], *plans[1:], plans[0]):
            before = core.generation.switcher.plan.name
            print(f"{before} to {plan}: {time_switch(core, plan)}", flush=True)


if __name__ == "__main__":
    main()
