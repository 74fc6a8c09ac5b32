"""Routes that tell: models, tiers, tokens, health, load, metrics."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from nitsum import __version__
from nitsum.errors import ApiError, bad_request
from nitsum.messages import Status
from nitsum.server.chat import prompt_tokens
from nitsum.server.fields import check_token
from nitsum.server.respond import json_response
from nitsum.server.schema import TOKENIZE_REFUSED, DetokenizeBody, TokenizeBody, parse_body
from nitsum.server.service import Service, inline_or_thread, read_body, service_of
from nitsum.tier import Tier


async def models(http: HttpRequest) -> Response:
    service = service_of(http)
    names = service.settings.model_names
    return json_response({"object": "list", "data": [_model(service, name) for name in names]})


async def model(http: HttpRequest) -> Response:
    service = service_of(http)
    name: str = http.path_params["name"]
    service.check_model(name)
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "nitsum",
        "max_model_len": service.limits.max_model_len,
        "tiers": list(service.tiers.names()),
    }


async def tiers(http: HttpRequest) -> Response:
    service = service_of(http)
    shown = [_tier(tier) for tier in service.tiers.ordered]
    default = service.settings.default_tier
    return json_response({"object": "list", "data": shown, "default": default})


def _tier(tier: Tier) -> dict[str, object]:
    return {
        "id": tier.name,
        "object": "tier",
        "level": tier.level,
        "ttft_ms": _ms(tier.ttft_s),
        "tpot_ms": _ms(tier.tpot_s),
        "deadline_ms": _ms(tier.deadline_s),
        "price": tier.price,
        "min_share": tier.min_share,
        "max_wait_ms": _ms(tier.max_wait_s),
        "over_capacity": tier.over_capacity,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


async def tokenize(http: HttpRequest) -> Response:
    """Tokens of a text, or of a conversation as it would be sent to the model."""
    service = service_of(http)
    body = parse_body(await read_body(http), TokenizeBody, TOKENIZE_REFUSED)
    service.check_model(body.model)
    tokens = await _tokenize(service, body)
    found: dict[str, object] = {
        "count": len(tokens),
        "max_model_len": service.limits.max_model_len,
        "tokens": tokens,
    }
    if body.return_token_strs:
        texts = [service.codec.token_bytes(t).decode("utf-8", "replace") for t in tokens]
        found["token_strs"] = texts
    return json_response(found)


async def _tokenize(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either prompt or messages.", "prompt")
    if body.messages is not None:
        return await prompt_tokens(service, body.messages)
    special = body.add_special_tokens is not False
    return await service.encode(body.prompt or "", add_special_tokens=special, param="prompt")


async def detokenize(http: HttpRequest) -> Response:
    service = service_of(http)
    body = parse_body(await read_body(http), DetokenizeBody)
    service.check_model(body.model)
    for token in body.tokens:
        check_token(token, service.limits.vocab_size, "tokens")
    text = await inline_or_thread(len(body.tokens), service.codec.decode, body.tokens)
    return json_response({"prompt": text})


async def version(http: HttpRequest) -> Response:
    return json_response({"version": __version__})


async def health(http: HttpRequest) -> Response:
    """200 unless the engine does not answer, or work waits and no step completes."""
    service = service_of(http)
    status = await service.engine.status()
    stalled_s = _stalled_s(service, status)
    if stalled_s > service.settings.stall_s:
        raise _unwell(f"Work is waiting and no step has completed for {stalled_s:.0f} s.")
    return json_response({"status": "ok", "plan": status.plan, "generation": status.generation})


def _stalled_s(service: Service, status: Status) -> float:
    """How long work has waited without a step, seconds.

    The engine's last step may be long ago because nothing was asked of it, so a stall is no longer
    than the oldest open request has been here.
    """
    return min(status.seconds_since_step, service.metrics.oldest_open_s())


async def ready(http: HttpRequest) -> Response:
    """200 while new requests are welcome."""
    service = service_of(http)
    service.check_accepting()
    status = await service.engine.status()
    if status.draining:
        raise _unwell("The engine is draining.")
    return json_response({"status": "ready"})


def _unwell(message: str) -> ApiError:
    return ApiError(message, status=503, type="server_error", code="server_is_overloaded")


async def load(http: HttpRequest) -> Response:
    """`server_load` as in vLLM, and where the requests are."""
    service = service_of(http)
    status = await service.engine.status()
    return json_response(
        {
            "server_load": len(service.metrics.open),
            "num_running": status.num_running,
            "num_waiting": status.num_waiting,
            "kv_used": status.kv_used,
        }
    )


async def metrics(http: HttpRequest) -> Response:
    service = service_of(http)
    try:
        status = await service.engine.status()
    except ApiError:
        status = None
    text, content_type = service.metrics.render(http.headers.get("accept", ""), status)
    return PlainTextResponse(text, headers={"content-type": content_type})
