"""The application: every route, on one screen."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from nitsum.engine.client import EngineClient
from nitsum.errors import ApiError
from nitsum.server import access, admin, info
from nitsum.server.chat import chat_completions
from nitsum.server.completions import completions
from nitsum.server.fields import Limits
from nitsum.server.metrics import Metrics
from nitsum.server.service import Service
from nitsum.server.settings import ServerSettings
from nitsum.server.tokenizer import TextCodec, load_codec
from nitsum.tier import TierSet

ROUTES = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", info.models),
    Route("/v1/models/{name:path}", info.model),
    Route("/v1/tiers", info.tiers),
    Route("/tokenize", info.tokenize, methods=["POST"]),
    Route("/detokenize", info.detokenize, methods=["POST"]),
    Route("/health", info.health),
    Route("/health/ready", info.ready),
    Route("/version", info.version),
    Route("/load", info.load),
    Route("/metrics", info.metrics),
    Route("/admin/plans", admin.plans),
    Route("/admin/plans/switch", admin.switch, methods=["POST"]),
    Route("/admin/drain", admin.drain, methods=["POST"]),
)


def build_app(client: EngineClient, settings: ServerSettings) -> Starlette:
    """The ASGI application; its lifespan starts and closes the client.

    Raises `CheckpointError` when the tokenizer or chat template cannot be read.
    """
    service = build_service(client, settings)
    app = Starlette(
        routes=list(ROUTES),
        middleware=[Middleware(access.Frame, settings=settings)],
        exception_handlers={
            ApiError: access.on_api_error,
            HTTPException: access.on_http_error,
            Exception: access.on_our_mistake,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    return app


def build_service(client: EngineClient, settings: ServerSettings) -> Service:
    tiers = TierSet(settings.tiers)
    codec = load_codec(settings.checkpoint)
    metrics = Metrics(settings.model_names[0], tiers)
    client.on_switch(metrics.saw_switch)
    return Service(
        engine=client,
        settings=settings,
        codec=codec,
        tiers=tiers,
        limits=Limits(settings.max_model_len, settings.vocab_size, _end_tokens(settings, codec)),
        metrics=metrics,
        created_s=int(time.time()),
    )


def _end_tokens(settings: ServerSettings, codec: TextCodec) -> tuple[int, ...]:
    """The configuration's end tokens, and the tokenizer's own."""
    own = () if codec.eos_id is None else (codec.eos_id,)
    return tuple(dict.fromkeys((*settings.eos_token_ids, *own)))


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    engine: EngineClient = app.state.service.engine
    await engine.start()
    try:
        yield
    finally:
        await engine.close()
