"""Who may call what, and the frame around every response: request id, errors, lost clients."""

from __future__ import annotations

import hmac
import ipaddress
import math
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nitsum.errors import ApiError
from nitsum.server.caller import now_s, request_id_of
from nitsum.server.keyfile import Key
from nitsum.server.keys import wrong_key
from nitsum.server.respond import json_response
from nitsum.server.service import Service
from nitsum.server.sse import ClientGone

_KEYED_PREFIXES = ("/v1/", "/tokenize", "/detokenize")
_ADMIN_PREFIX = "/admin/"
_FORWARDED_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


class Frame:
    """ASGI middleware: checks keys, stamps arrival, adds `x-request-id`, forgets lost clients."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        scope["nitsum.arrival_s"] = now_s()
        scope["nitsum.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                own["x-request-id"] = request_id
                own.update(self._left(scope))
            await send(message)

        try:
            if "nitsum.key" not in scope:  # a line of a batch brings the key of its batch
                scope["nitsum.key"] = check_access(scope, headers, self._service)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except (ClientGone, ClientDisconnect):
            return

    def _left(self, scope: Scope) -> dict[str, str]:
        """What the caller's key has left, after this call."""
        key: Key | None = scope.get("nitsum.key")
        return {} if key is None else self._service.books.quotas.headers(key)


def check_access(scope: Scope, headers: Headers, service: Service) -> Key | None:
    """The caller's key, if it needs one; raises a 401 or 403 for who may not use this path."""
    path: str = scope["path"]
    settings = service.settings
    if path.startswith(_ADMIN_PREFIX):
        _check_admin(scope, headers, settings.admin_key)
    elif path.startswith(_KEYED_PREFIXES):
        return _check_key(headers, service)
    return None


def _check_key(headers: Headers, service: Service) -> Key | None:
    """The single key (`--api-key`) opens everything and has no limits."""
    single = service.settings.api_key
    if single is None and service.keys is None:
        return None
    if single is not None and _has_key(headers, single):
        return None
    if service.keys is None:
        raise wrong_key()
    return service.keys.find(_sent_key(headers))


def _check_admin(scope: Scope, headers: Headers, admin_key: str | None) -> None:
    if admin_key is not None and _has_key(headers, admin_key):
        return
    if not _is_local(scope, headers):
        raise ApiError(
            "Admin routes need the admin key (--admin-key), as 'Authorization: Bearer KEY', or a "
            "caller on this machine.",
            status=403,
            type="permission_error",
            code="admin_only",
        )


def _has_key(headers: Headers, key: str) -> bool:
    return hmac.compare_digest(_sent_key(headers).encode(), key.encode())


def _sent_key(headers: Headers) -> str:
    """The bearer token; empty without one, which opens nothing."""
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    return sent.strip() if scheme.lower() == "bearer" else ""


def _is_local(scope: Scope, headers: Headers) -> bool:
    """The caller runs on this machine, and is neither a proxy nor a page of another site."""
    client = scope.get("client")
    if client is None or not is_loopback(client[0]):
        return False
    if any(name in headers for name in _FORWARDED_HEADERS):
        return False
    host = urlsplit(f"//{headers.get('host', '')}").hostname
    origin = headers.get("origin")
    return is_loopback(host) and (origin is None or is_loopback(urlsplit(origin).hostname))


def is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def error_response(error: ApiError) -> Response:
    """OpenAI's error body, and when to try again."""
    response = json_response(error.body())
    response.status_code = error.status
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(error.retry_after_s))
        response.headers["retry-after-ms"] = str(round(error.retry_after_s * 1000))
    if error.code == "insufficient_quota":
        response.headers["x-should-retry"] = "false"
    return response


async def on_api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def on_http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = f"{where}: {error.detail}. See /v1/models for what is served."
    response = error_response(ApiError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


async def on_our_mistake(request: HttpRequest, error: Exception) -> Response:
    message = "The server failed on this request; its log says where. Please report it."
    return error_response(ApiError(message, status=500, type="server_error"))
