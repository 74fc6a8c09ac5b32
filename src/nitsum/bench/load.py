"""Open-loop load: arrivals never wait for answers, and latency counts from the planned arrival.

What the client sees becomes the same events an engine writes, so one set of metrics judges a run
whether it was served here, served elsewhere or simulated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, closing
from dataclasses import dataclass, field

from nitsum.bench.http_stream import Pool
from nitsum.bench.stream_client import Endpoint, Piece, StreamRefused, stream
from nitsum.events import Arrived, Downgraded, EventSink, Finished, Refused, StepEnded
from nitsum.metrics.targets import Target
from nitsum.plan import Group
from nitsum.request import FinishReason
from nitsum.workload.items import WorkItem

_CLIENT = Group(1, 0)
"""Steps are not seen from outside; every arrival of tokens stands for one."""

MAX_OPEN = 4096

TargetOf = Callable[[WorkItem], Target]
Progress = Callable[["LoadState"], None]


@dataclass
class LoadState:
    """How far a run is."""

    num_sent: int = 0
    num_open: int = 0
    num_done: int = 0
    num_refused: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    max_late_s: float = 0.0
    """How late the generator itself sent a request, at worst; large values void a run."""
    errors: dict[str, int] = field(default_factory=dict[str, int])


@dataclass
class _Stream:
    """One answer as it comes in."""

    item: WorkItem
    prompt: list[int]
    output: list[int] = field(default_factory=list[int])
    num_tokens: int = 0
    tier: str = ""
    reason: FinishReason = "error"

    def add(self, piece: Piece) -> None:
        self.num_tokens += piece.num_tokens
        self.output.extend(piece.token_ids)
        if piece.finish_reason in ("stop", "length"):
            self.reason = piece.finish_reason


class LoadRun:
    """Sends a workload to one endpoint and writes what it sees as events."""

    def __init__(
        self,
        endpoint: Endpoint,
        items: Iterable[WorkItem],
        sink: EventSink,
        *,
        vocab_size: int,
        target_of: TargetOf | None = None,
        tells_targets: bool = True,
        max_open: int = MAX_OPEN,
        drain_s: float | None = None,
    ) -> None:
        """Requests are held to `target_of`; the server learns of it if `tells_targets`.

        `max_open` bounds sockets; reaching it is counted as lateness, never hidden. What is not
        answered `drain_s` after the last arrival is broken off, or not sent any more, and has no
        end; None waits for all.
        """
        self.endpoint = endpoint
        self.items = items
        self.sink = sink
        self.vocab_size = vocab_size
        self.target_of = target_of or (lambda _item: Target())
        self.tells_targets = tells_targets
        self.drain_s = drain_s
        self.state = LoadState()
        self._room = asyncio.Semaphore(max_open)
        self._tasks: set[asyncio.Task[None]] = set()
        self._start_s = 0.0
        self._end_s: float | None = None
        """When all is broken off; None: never."""
        self._step_id = 0

    async def run(self, on_progress: Progress | None = None) -> LoadState:
        """Until everything sent has ended, one way or the other."""
        items = list(self.items)
        with closing(Pool(self.endpoint.url)) as pool:
            self._start_s = time.monotonic()
            if self.drain_s is not None:
                last_s = max((item.at_s for item in items), default=0.0)
                self._end_s = self._start_s + last_s + self.drain_s
            ticker = asyncio.create_task(self._tick(on_progress)) if on_progress else None
            for num_before, item in enumerate(items):
                await self._wait_until(item.at_s)
                if not await self._start(pool, item):
                    self._leave(items[num_before:])
                    break
            await self._drain()
            if ticker is not None:
                ticker.cancel()
        return self.state

    def _leave(self, items: Iterable[WorkItem]) -> None:
        """They have arrived, found no stream that was free, and are not sent any more."""
        for item in items:
            self._note_late(item)
            self._arrived(item, item.num_prompt)

    async def _drain(self) -> None:
        """Until what is under way has ended, or the run."""
        while self._tasks:
            left_s = self._left_s()
            if left_s is not None and left_s <= 0.0:
                break
            await asyncio.wait(self._tasks, timeout=left_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _left_s(self) -> float | None:
        return None if self._end_s is None else self._end_s - time.monotonic()

    async def _tick(self, on_progress: Progress) -> None:
        while True:
            on_progress(self.state)
            await asyncio.sleep(1.0)

    async def _wait_until(self, at_s: float) -> None:
        delay_s = self._start_s + at_s - time.monotonic()
        if delay_s > 0:
            await asyncio.sleep(delay_s)

    async def _start(self, pool: Pool, item: WorkItem) -> bool:
        """Send it; False if no stream was free before the end."""
        try:
            async with asyncio.timeout(self._left_s()):
                await self._room.acquire()
        except TimeoutError:
            return False
        self._note_late(item)
        task = asyncio.create_task(self._call(pool, item))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return True

    def _note_late(self, item: WorkItem) -> None:
        late_s = time.monotonic() - self._start_s - item.at_s
        self.state.max_late_s = max(self.state.max_late_s, late_s)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # a mistake of ours ends the run

    async def _call(self, pool: Pool, item: WorkItem) -> None:
        answer = _Stream(item, item.prompt(self.vocab_size), tier=item.tier)
        self._arrived(item, len(answer.prompt))
        self.state.num_sent += 1
        self.state.num_open += 1
        told = self.target_of(item) if self.tells_targets else Target()
        pieces = stream(pool, self.endpoint, item, answer.prompt, told)
        try:
            await self._read(pieces, answer)
        except StreamRefused as refusal:
            self._refused(item, refusal)
            return
        except OSError as error:
            self._count_error(type(error).__name__)
        finally:
            self.state.num_open -= 1
            self._room.release()
        self._finished(answer)
        await self._follow(pool, answer)

    async def _read(self, pieces: AsyncGenerator[Piece, None], answer: _Stream) -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                answer.add(piece)
                self._tokens(answer, piece)

    async def _follow(self, pool: Pool, answer: _Stream) -> None:
        """The chain's next call, after the time its sender needs to think."""
        if answer.reason == "error":
            return
        output = answer.output or [answer.prompt[0]] * answer.num_tokens
        done_s = time.monotonic() - self._start_s
        following = answer.item.following(done_s, answer.prompt, output)
        if following is not None:
            await self._wait_until(following.at_s)
            await self._start(pool, following)

    # -- events --

    def _arrived(self, item: WorkItem, num_prompt: int) -> None:
        target = self.target_of(item)
        deadline_s = item.chain.deadline_s if item.chain else None
        self.sink.emit(
            Arrived(
                at_s=time.monotonic(),
                request_id=item.request_id,
                tier_asked=item.tier,
                tier=item.tier,
                tenant=item.tenant,
                num_prompt=num_prompt,
                max_tokens=item.num_output,
                arrival_s=self._start_s + item.at_s,
                ttft_target_s=target.ttft_s,
                tpot_target_s=target.tpot_s,
                deadline_s=target.deadline_s,
                chain_id=item.chain.chain_id if item.chain else None,
                chain_deadline_s=None
                if deadline_s is None
                else self._start_s + item.chain_start_s + deadline_s,
            )
        )

    def _tokens(self, answer: _Stream, piece: Piece) -> None:
        if piece.tier is not None and piece.tier != answer.tier:
            self._downgraded(answer, piece.tier)
        if piece.num_tokens:
            self.state.num_tokens += piece.num_tokens
            self._step_id += 1
            self.sink.emit(
                StepEnded(
                    at_s=piece.at_s,
                    step_id=self._step_id,
                    group=_CLIENT,
                    seconds=0.0,
                    tokens=[(answer.item.request_id, piece.num_tokens)],
                )
            )

    def _downgraded(self, answer: _Stream, tier: str) -> None:
        self.sink.emit(
            Downgraded(
                at_s=time.monotonic(),
                request_id=answer.item.request_id,
                from_tier=answer.tier,
                to_tier=tier,
                reason="served as another tier",
            )
        )
        answer.tier = tier

    def _refused(self, item: WorkItem, refusal: StreamRefused) -> None:
        self.state.num_refused += 1
        self._count_error(f"{refusal.status} {refusal.code}")
        self.sink.emit(
            Refused(
                at_s=time.monotonic(),
                request_id=item.request_id,
                tier=item.tier,
                code=refusal.code,
            )
        )

    def _finished(self, answer: _Stream) -> None:
        if answer.reason == "error":
            self.state.num_failed += 1
        else:
            self.state.num_done += 1
        self.sink.emit(
            Finished(
                at_s=time.monotonic(),
                request_id=answer.item.request_id,
                tier=answer.tier,
                reason=answer.reason,
                num_output=answer.num_tokens,
                num_cached=0,
                group=None,
            )
        )

    def _count_error(self, name: str) -> None:
        self.state.errors[name] = self.state.errors.get(name, 0) + 1
