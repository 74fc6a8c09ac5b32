"""A core on a fake machine, and the ways tests drive it."""

from __future__ import annotations

import itertools

from nitsum.clock import VirtualClock
from nitsum.config import EngineConfig
from nitsum.cost.protocol import CostModel
from nitsum.engine.core import Core
from nitsum.engine.fake_executor import FakeExecutor, answer_of
from nitsum.events import EventLog
from nitsum.kv.cache import ArenaShape
from nitsum.messages import Output, SwitchReport, Tokens
from nitsum.plan import PlanSet, default_plans
from nitsum.request import Request, SamplingParams

BLOCK_TOKENS = 4


class Machine:
    """What a server would see, with every answer checked against the only right one."""

    def __init__(
        self,
        num_ranks: int = 4,
        *,
        num_blocks: int = 24,
        units_per_block: int = 4,
        seed: int = 0,
        plans: PlanSet | None = None,
        num_host_blocks: int = 0,
        cost: CostModel | None = None,
        **settings: object,
    ) -> None:
        self.plans = plans or default_plans(num_ranks)
        options = {"max_num_seqs": 4, "max_batch_tokens": 16, "precopy_units": 3, **settings}
        self.config = EngineConfig(
            model="fake",
            plans=self.plans,
            block_tokens=BLOCK_TOKENS,
            check_accounting=True,
            **options,  # type: ignore[arg-type]
        )
        self.arena = ArenaShape(
            num_ranks=num_ranks,
            num_units=num_blocks * units_per_block,
            units_per_block=units_per_block,
            block_tokens=BLOCK_TOKENS,
            min_degree=self.plans.degrees[0],
            num_host_units=num_host_blocks * units_per_block,
        )
        self.executor = FakeExecutor(self.arena, seed, max_num_seqs=self.config.max_num_seqs)
        self.log = EventLog()
        self.clock = VirtualClock()
        self.core = Core(self.config, self.arena, self.executor, self.clock, self.log, cost=cost)
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.errors: dict[str, Output] = {}
        self.reports: list[SwitchReport] = []
        self._ids = itertools.count()

    def submit(
        self, prompt: list[int], max_tokens: int = 5, tier: str = "default", **sampling: object
    ) -> str:
        request_id = f"r{next(self._ids)}"
        request = Request(
            request_id,
            prompt,
            SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
            tier=tier,
            arrival_s=self.clock.now(),
        )
        self.requests[request_id] = request
        self.answers[request_id] = []
        self.core.submit(request)
        return request_id

    def abort(self, request_id: str) -> None:
        self.core.abort(request_id)
        self.ended.setdefault(request_id, "abort")

    def switch(self, plan: str) -> None:
        self.core.switch(f"op{next(self._ids)}", plan)

    def turn(self) -> None:
        self.clock.advance_to(self.clock.now() + 0.001)
        for message in self.core.turn():
            if isinstance(message, SwitchReport):
                self.reports.append(message)
            elif isinstance(message, Output):
                self._take(message)
            elif isinstance(message, Tokens):
                for request_id, token in zip(message.request_ids, message.tokens, strict=True):
                    self._hear(request_id, [token])

    def run(self, max_turns: int = 5000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_turns):
            if not self.core.has_work:
                return
            self.turn()
        raise AssertionError(f"no end in sight: {self.core.status('stuck')}")

    def drain(self) -> None:
        """Run to the end, then see that every answer is complete and right."""
        self.run()
        for _ in range(20):
            self.turn()
        for loop in self.core.generation.loops.values():
            assert not loop.scheduler.is_closing, "the lane takes nobody in any more"
        for request_id, request in self.requests.items():
            assert request_id in self.ended, f"{request_id} never ended"
            if self.ended[request_id] in ("stop", "length"):
                sampling = request.sampling
                expected = answer_of(request.prompt, sampling.max_tokens, sampling.stop_token_ids)
                assert self.answers[request_id] == expected, request_id
        assert not self.core.generation.kv.tables
        assert not self.core.generation.kv.parked
        assert not self.core.generation.kv.host.loading
        slots = self.core.generation.dispatcher
        assert slots.num_free_slots == 4 * self.config.max_num_seqs * self.config.num_ranks

    def _take(self, output: Output) -> None:
        request_id = output.request_id
        if output.error is not None:
            assert request_id not in self.ended, f"{request_id} spoke after its end"
            self.errors[request_id] = output
            self.ended[request_id] = "error"
            return
        lanes = {str(lane.group) for lane in self.plans[output.plan].lanes}
        assert output.lane in lanes, f"{output.plan} has no lane {output.lane}"
        self._hear(request_id, output.tokens)
        if output.finish_reason is not None:
            self.ended[request_id] = output.finish_reason

    def _hear(self, request_id: str, tokens: list[int]) -> None:
        assert request_id not in self.ended, f"{request_id} spoke after its end"
        so_far = self.answers[request_id]
        so_far.extend(tokens)
        expected = answer_of(self.requests[request_id].prompt, len(so_far))
        assert so_far == expected, f"{request_id} lost or repeated a token"
