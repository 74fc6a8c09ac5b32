"""An engine in the server's own process that answers from a script; for tests of the server."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence

from nitsum.engine.client import SwitchListener, engine_gone, gone_output
from nitsum.messages import LaneStatus, Output, Status, SwitchReport, TokenLogprobs
from nitsum.plan import Group
from nitsum.request import FinishReason, Request, SamplingParams

Script = Callable[[Request], Sequence[int]]


def echo(request: Request) -> Sequence[int]:
    """The prompt again, over and over, as long as the answer may be."""
    repeats = 1 + request.sampling.max_tokens // len(request.prompt)
    return request.prompt * repeats


class FakeEngineClient:
    """Deterministic: the answer is `script(request)`, ended by stop tokens and `max_tokens`.

    `outputs_before` are sent first as they are: a refusal, for instance. A script that runs out
    before `max_tokens` ends the answer with `stop`.
    """

    def __init__(
        self,
        script: Script = echo,
        *,
        plans: Sequence[str] = ("TP1",),
        delay_s: float = 0.0,
        tokens_per_output: int = 1,
        tier: Callable[[Request], tuple[str, str | None]] = lambda request: (request.tier, None),
        late: bool = False,
        refuse: Callable[[Request], Output | None] = lambda request: None,
        num_cached: int = 0,
    ) -> None:
        self.script = script
        self.delay_s = delay_s
        self.requests: list[Request] = []
        """Every request submitted, in order."""
        self.aborted: list[str] = []
        """Requests closed before they ended."""
        self.num_closed = 0
        self.seconds_since_step = 0.0
        self._plans = tuple(plans)
        self._plan = self._plans[0]
        self._tokens_per_output = tokens_per_output
        self._tier = tier
        self._late = late
        self._refuse = refuse
        self._num_cached = num_cached
        self._running: set[str] = set()
        self._draining = False
        self._reports: dict[str, SwitchReport] = {}
        self._listeners: list[SwitchListener] = []
        self._dead = asyncio.Event()

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.num_closed += 1
        self._dead.set()

    def die(self) -> None:
        """From now on, all requests end as they do when the engine's process ends."""
        self._dead.set()

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self._running.add(request.request_id)
        ended = False
        try:
            for output in self._outputs(request):
                await self._pause()
                if self._dead.is_set():
                    output = gone_output(request.request_id)
                ended = output.finish_reason is not None or output.error is not None
                yield output
                if ended:
                    return
        finally:
            self._running.discard(request.request_id)
            if not ended:
                self.aborted.append(request.request_id)

    async def _pause(self) -> None:
        if self.delay_s == 0:
            await asyncio.sleep(0)
            return
        try:
            await asyncio.wait_for(self._dead.wait(), self.delay_s)
        except TimeoutError:
            return

    def _outputs(self, request: Request) -> Sequence[Output]:
        refusal = self._refuse(request)
        if refusal is not None:
            return [refusal]
        tokens, reason = answer_of(self.script(request), request.sampling)
        size = self._tokens_per_output
        pieces = [tokens[i : i + size] for i in range(0, len(tokens), size)] or [[]]
        return [
            self._output(request, piece, reason if piece is pieces[-1] else None)
            for piece in pieces
        ]

    def _output(self, request: Request, tokens: list[int], reason: FinishReason | None) -> Output:
        tier, why = self._tier(request)
        return Output(
            request.request_id,
            tokens,
            reason,
            logprobs=_logprobs(tokens, request.sampling.logprobs),
            tier=tier,
            reason=why,
            late=self._late,
            plan=self._plan,
            lane=str(Group(1, 0)),
            hidden=hidden_of(request) if request.sampling.return_hidden else None,
            num_cached=self._num_cached,
            queue_s=0.002,
        )

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def switch(self, op_id: str, plan: str) -> SwitchReport:
        done = self._reports.get(op_id)
        if done is not None:
            return done
        before, known = self._plan, plan in self._plans
        if known:
            self._plan = plan
        message = "" if known else f"Unknown plan {plan!r}. This server holds: {self._plans}."
        report = SwitchReport(op_id, before, plan, ok=known, message=message)
        self._reports[op_id] = report
        for listener in self._listeners:
            listener(report)
        return report

    async def drain(self) -> None:
        self._draining = True

    async def status(self, num_decisions: int = 0) -> Status:
        if self._dead.is_set():
            raise engine_gone()
        running = len(self._running)
        lane = LaneStatus(Group(1, 0), "mixed", (), running, 0, 0, self._draining)
        return Status(
            op_id="",
            plan=self._plan,
            plans=list(self._plans),
            switching_to=None,
            lanes=[lane],
            kv_used=[0.25],
            num_waiting=0,
            num_running=running,
            seconds_since_step=self.seconds_since_step,
            generation=0,
            draining=self._draining,
        )

    def on_switch(self, listener: SwitchListener) -> None:
        self._listeners.append(listener)


def answer_of(script: Sequence[int], sampling: SamplingParams) -> tuple[list[int], FinishReason]:
    """Tokens of an answer and why it ends, as an engine that draws `script` would have it.

    The stop token is part of the answer.
    """
    tokens: list[int] = []
    for token in script:
        if token in sampling.stop_token_ids and len(tokens) < sampling.min_tokens:
            continue
        tokens.append(token)
        if token in sampling.stop_token_ids:
            return tokens, "stop"
        if len(tokens) == sampling.max_tokens:
            return tokens, "length"
    return tokens, "stop"


def hidden_of(request: Request) -> bytes:
    """A state that no other prompt of a test has: 3, 4 and the sum of its tokens."""
    return array("f", (3.0, 4.0, float(sum(request.prompt)))).tobytes()


def _logprobs(tokens: list[int], num_top: int | None) -> list[TokenLogprobs]:
    if num_top is None:
        return []
    return [
        TokenLogprobs(
            -0.25,
            [token + rank if rank else token for rank in range(num_top)],
            [-0.25 - rank for rank in range(num_top)],
        )
        for token in tokens
    ]
