"""Which requests the engine takes in at all."""

from __future__ import annotations

from collections.abc import Container

from nitsum.config import EngineConfig
from nitsum.errors import ApiError, bad_request
from nitsum.kv.cache import ArenaShape
from nitsum.request import Request


def check_request(
    request: Request, in_use: Container[str], *, longest: int, draining: bool
) -> None:
    """Raise the `ApiError` the client should see if it cannot come in.

    `in_use` are the ids of requests that are here, `longest` what `max_request_tokens` says.
    """
    if draining:
        raise ApiError(
            "The server is shutting down and takes no new requests.",
            status=503,
            type="server_error",
            code="server_is_overloaded",
            retry_after_s=30.0,
        )
    if request.request_id in in_use:
        raise bad_request(f"Request id {request.request_id!r} is in use.", "request_id")
    if not request.prompt:
        raise bad_request("The prompt is empty.", "prompt")
    if len(request.prompt) + request.sampling.max_tokens > longest:
        raise bad_request(
            f"Prompt ({len(request.prompt)} tokens) and answer (up to "
            f"{request.sampling.max_tokens}) exceed the {longest} tokens a request may have. "
            "Shorten the prompt or lower max_tokens.",
            "prompt",
            "context_length_exceeded",
        )


def max_request_tokens(config: EngineConfig, arena: ArenaShape) -> int:
    """Prompt plus answer that fit the context, and an otherwise empty lane of any plan."""
    capacity = min(
        arena.num_units // arena.page_units(group) * arena.block_tokens
        for group in config.plans.groups
    )
    return min(capacity, config.max_model_len) if config.max_model_len else capacity
