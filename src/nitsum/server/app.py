"""The application: every route, on one screen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from nitsum.engine.client import EngineClient
from nitsum.errors import ApiError
from nitsum.server import access, admin, batches, dashboard, files, info, logs, openapi
from nitsum.server.batchwork import open_work
from nitsum.server.books import open_books
from nitsum.server.chat import chat_completions
from nitsum.server.completions import completions
from nitsum.server.embeddings import embeddings
from nitsum.server.fields import Limits
from nitsum.server.keys import KeyRing
from nitsum.server.metrics import Metrics
from nitsum.server.sampler import Sampler
from nitsum.server.service import Service
from nitsum.server.settings import ServerSettings
from nitsum.server.tokenizer import TextCodec, load_codec
from nitsum.server.tracing import CallerTrace, Tracing
from nitsum.server.turnstile import Turnstile
from nitsum.server.usage import completions_usage, embeddings_usage
from nitsum.tier import TierSet

_LAST_ENTRIES_S = 2.0

ROUTES = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/models", info.models),
    Route("/v1/models/{name:path}", info.model),
    Route("/v1/tiers", info.tiers),
    Route("/v1/organization/usage/completions", completions_usage),
    Route("/v1/organization/usage/embeddings", embeddings_usage),
    Route("/tokenize", info.tokenize, methods=["POST"]),
    Route("/detokenize", info.detokenize, methods=["POST"]),
    Route("/v1/files", files.create, methods=["POST"]),
    Route("/v1/files", files.list_files),
    Route("/v1/files/{file_id}", files.retrieve),
    Route("/v1/files/{file_id}", files.delete, methods=["DELETE"]),
    Route("/v1/files/{file_id}/content", files.content),
    Route("/v1/batches", batches.create, methods=["POST"]),
    Route("/v1/batches", batches.list_batches),
    Route("/v1/batches/{batch_id}", batches.retrieve),
    Route("/v1/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
    Route("/health", info.health),
    Route("/health/ready", info.ready),
    Route("/version", info.version),
    Route("/load", info.load),
    Route("/metrics", info.metrics),
    Route("/admin/plans", admin.plans),
    Route("/admin/plans/switch", admin.switch, methods=["POST"]),
    Route("/admin/decisions", admin.decisions),
    Route("/admin/drain", admin.drain, methods=["POST"]),
    *dashboard.ROUTES,
    *openapi.ROUTES,
)


def build_app(client: EngineClient, settings: ServerSettings) -> Starlette:
    """The ASGI application; its lifespan starts and closes the client.

    Raises `CheckpointError` when the tokenizer or chat template cannot be read.
    """
    service = build_service(client, settings)
    app = Starlette(
        routes=list(ROUTES),
        middleware=[
            *_outside(settings),
            Middleware(access.Frame, service=service),
            Middleware(Turnstile),
        ],
        exception_handlers={
            ApiError: access.on_api_error,
            HTTPException: access.on_http_error,
            Exception: access.on_our_mistake,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    app.state.sampler = Sampler(service)
    return app


def _outside(settings: ServerSettings) -> list[Middleware]:
    """What sees a request before everything else, and its response after."""
    tracing = [Middleware(CallerTrace)] if settings.otlp else []
    return [Middleware(logs.RequestLog), *tracing]


def build_service(client: EngineClient, settings: ServerSettings) -> Service:
    tiers = TierSet(settings.tiers)
    codec = load_codec(settings.checkpoint)
    metrics = Metrics(settings.model_names[0], tiers)
    if settings.otlp:
        metrics.tracing = Tracing(settings.otlp, settings.model_names[0])
    client.on_switch(metrics.saw_switch)
    keys = None if settings.keys is None else KeyRing(settings.keys, tiers)
    books = open_books(settings, tiers, keys)
    return Service(
        engine=client,
        settings=settings,
        codec=codec,
        tiers=tiers,
        limits=Limits(settings.max_model_len, settings.vocab_size, _end_tokens(settings, codec)),
        metrics=metrics,
        books=books,
        keys=keys,
        created_s=int(time.time()),
    )


def _end_tokens(settings: ServerSettings, codec: TextCodec) -> tuple[int, ...]:
    """The configuration's end tokens, and the tokenizer's own."""
    own = () if codec.eos_id is None else (codec.eos_id,)
    return tuple(dict.fromkeys((*settings.eos_token_ids, *own)))


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: Service = app.state.service
    await service.engine.start()
    service.books.start()
    service.batch_work = open_work(service.settings, service.keys, app)
    sampling = asyncio.create_task(app.state.sampler.run(), name="sampler")
    try:
        yield
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
        if service.batch_work is not None:
            await service.batch_work.close()
        await service.engine.close()
        await _until_closed(service.metrics)
        await asyncio.to_thread(service.books.close)
        await asyncio.to_thread(_close_tracing, app.state.service.metrics)


def _close_tracing(metrics: Metrics) -> None:
    if metrics.tracing is not None:
        metrics.tracing.close()


async def _until_closed(metrics: Metrics) -> None:
    """Requests whose engine is gone end in an error, and then they are in the books."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_ENTRIES_S):
            while metrics.open:
                await asyncio.sleep(0.01)
