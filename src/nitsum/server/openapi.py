"""`/openapi.json`: the API described for tools, made from the types that requests are read with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from nitsum import __version__
from nitsum.server.respond import json_response
from nitsum.server.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    SwitchBody,
    TokenizeBody,
)
from nitsum.server.service import service_of
from nitsum.server.shapes import ChatCompletion, Completion, Embeddings
from nitsum.server.state import State
from nitsum.tier import SERVICE_TIERS

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
_REF = "#/components/schemas/{name}"


class ErrorDetail(msgspec.Struct, rename={"kind": "type"}):
    """What went wrong, and which field it was about."""

    message: str
    kind: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    error: ErrorDetail


@dataclass(frozen=True)
class Operation:
    """A method of a path: what it takes, what it gives when all is well."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    media: str = JSON
    streams: bool = False
    errors: Sequence[int] = ()


_POSTED = (400, 413)
_SERVED = (*_POSTED, 401, 403, 404, 429, 503)
_ASKED = (401, 503)

OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "Answer a conversation",
        ChatBody,
        ChatCompletion,
        streams=True,
        errors=_SERVED,
    ),
    Operation(
        "post",
        "/v1/completions",
        "Go on from a prompt",
        CompletionBody,
        Completion,
        streams=True,
        errors=_SERVED,
    ),
    Operation(
        "post", "/v1/embeddings", "Vectors of texts", EmbeddingBody, Embeddings, errors=_SERVED
    ),
    Operation("get", "/v1/models", "Models, with their tiers", errors=_ASKED),
    Operation("get", "/v1/models/{name}", "One model", errors=(401, 404)),
    Operation("get", "/v1/tiers", "Tiers: targets and prices", errors=_ASKED),
    Operation(
        "post", "/tokenize", "Tokens of a text or conversation", TokenizeBody, errors=_SERVED
    ),
    Operation("post", "/detokenize", "Text of tokens", DetokenizeBody, errors=_SERVED),
    Operation("get", "/health", "Whether work gets done", errors=(503,)),
    Operation("get", "/health/ready", "Whether new requests are welcome", errors=(503,)),
    Operation("get", "/version", "The server's version"),
    Operation("get", "/load", "Where the requests are", errors=(503,)),
    Operation("get", "/metrics", "For Prometheus", media=TEXT),
    Operation("get", "/admin/plans", "Plans and lanes", errors=(403, 503)),
    Operation(
        "post",
        "/admin/plans/switch",
        "Go to a plan",
        SwitchBody,
        errors=(*_POSTED, 403, 409, 415, 503),
    ),
    Operation("get", "/admin/state", "What the dashboard shows", answer=State, errors=(403,)),
)


async def openapi(http: HttpRequest) -> Response:
    return json_response(document(service_of(http).model_name))


@cache
def document(model_name: str) -> dict[str, Any]:
    """The description, OpenAPI 3.1."""
    types = [kind for one in OPERATIONS for kind in (one.body, one.answer) if kind] + [Error]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _operation(one, model_name)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Nitsum", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(one: Operation, model_name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": _name(one),
        "summary": one.summary,
        "responses": dict(_responses(one)),
    }
    if "{name}" in one.path:
        schema = {"type": "string", "examples": [model_name]}
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    if one.body is not None:
        content: dict[str, Any] = {"schema": _ref(one.body)}
        if issubclass(one.body, ChatBody | CompletionBody | EmbeddingBody):
            content["schema"] = {"allOf": [content["schema"], _known_tiers()]}
        found["requestBody"] = {"required": True, "content": {JSON: content}}
    return found


def _known_tiers() -> dict[str, Any]:
    """The usual names; a server with tiers of its own takes those."""
    return {"properties": {"service_tier": {"examples": list(SERVICE_TIERS)}}}


def _name(one: Operation) -> str:
    words = one.path.replace("{name}", "one").replace("-", "_").strip("/").split("/")
    return "_".join([one.method, *words])


def _responses(one: Operation) -> Iterator[tuple[str, dict[str, Any]]]:
    schema = _ref(one.answer) if one.answer else {"type": "object"}
    content: dict[str, Any] = {one.media: {"schema": schema} if one.media == JSON else {}}
    if one.streams:
        content[EVENTS] = {}
    yield "200", {"description": "All is well.", "content": content}
    for status in one.errors:
        yield str(status), {"description": "Refused.", "content": {JSON: {"schema": _ref(Error)}}}


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


ROUTES = (Route("/openapi.json", openapi),)
