"""A call becomes engine requests; their outputs become one stream of pieces."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext

import msgspec

from nitsum.engine.client import EngineClient
from nitsum.errors import ApiError
from nitsum.messages import Output
from nitsum.request import Request, SamplingParams
from nitsum.server.answer import Answer, Piece
from nitsum.server.books import Books
from nitsum.server.caller import Caller
from nitsum.server.fields import copy_seed
from nitsum.server.job import Job
from nitsum.server.metrics import Metrics, Watch


def engine_requests(
    job_id: str,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    num_copies: int,
    caller: Caller,
    order: int,
) -> list[Request]:
    """`num_copies` requests for each prompt, in the order of the choices."""
    return [
        Request(
            request_id=f"{job_id}-{prompt_index * num_copies + copy}",
            prompt=prompt,
            sampling=msgspec.structs.replace(params, seed=copy_seed(params.seed, copy)),
            tier=caller.tier,
            tier_asked=caller.tier_asked,
            arrival_s=caller.arrival_s,
            order=order,
            tenant=caller.tenant,
            ttft_target_s=caller.ttft_target_s,
            tpot_target_s=caller.tpot_target_s,
            chain_id=caller.chain_id,
            chain_deadline_s=caller.chain_deadline_s,
        )
        for prompt_index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
        for copy in range(num_copies)
    ]


def new_id(kind: str) -> str:
    """An id like `chatcmpl-...`, unique across servers."""
    return f"{kind}-{uuid.uuid4().hex}"


def pieces(
    engine: EngineClient, job: Job, metrics: Metrics, books: Books
) -> AsyncGenerator[Piece, None]:
    """Pieces of all answers as they come; ends when every answer has ended.

    Raises `ApiError` when one fails or the caller's key has no room for it. Closing (or cancelling)
    it aborts what is left. However it ends, the books have an entry.
    """
    entry = books.open(job)
    if len(job.answers) == 1:
        return _follow(engine, job, job.answers[0], metrics, entry)
    streams = [_follow(engine, job, answer, metrics, nullcontext()) for answer in job.answers]
    return _merge(streams, entry)


async def _follow(
    engine: EngineClient,
    job: Job,
    answer: Answer,
    metrics: Metrics,
    entry: AbstractContextManager[None],
) -> AsyncGenerator[Piece, None]:
    with entry, metrics.watch(answer.request) as watch:
        job.watches.append(watch)
        async with aclosing(engine.generate(answer.request)) as outputs:
            async for output in outputs:
                if job.first_output is None:
                    job.first_output = output
                piece = _add(answer, output, watch)
                yield piece
                if piece.finish_reason is not None:
                    return
        raise ApiError("The engine ended this request without an answer.", status=500)


def _add(answer: Answer, output: Output, watch: Watch) -> Piece:
    before = answer.num_tokens
    try:
        piece = answer.add(output)
    except ApiError as error:
        watch.failed(error)
        raise
    watch.saw(output, answer.num_tokens - before, ended=piece.finish_reason is not None)
    return piece


async def _merge(
    streams: Sequence[AsyncGenerator[Piece, None]], entry: AbstractContextManager[None]
) -> AsyncGenerator[Piece, None]:
    with entry:
        async with aclosing(_interleave(streams)) as merged:
            async for piece in merged:
                yield piece


async def _interleave(
    streams: Sequence[AsyncGenerator[Piece, None]],
) -> AsyncGenerator[Piece, None]:
    """Items of several streams as they come; the first error ends all of them."""
    ready: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, ready)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    stream: AsyncGenerator[Piece, None], ready: asyncio.Queue[Piece | BaseException | None]
) -> None:
    try:
        async with aclosing(stream):
            async for piece in stream:
                ready.put_nowait(piece)
    except Exception as error:
        ready.put_nowait(error)
    else:
        ready.put_nowait(None)
