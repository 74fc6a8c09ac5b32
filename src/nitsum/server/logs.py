"""Logs as text or JSON: one line at the end of each request, with its id and what became of it."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nitsum.server.caller import now_s
from nitsum.server.sse import offer_direct_send

LogFormat = Literal["text", "json"]

_QUIET = ("/health", "/metrics", "/load", "/admin/state", "/version")
"""Asked for by machines, every few seconds."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; the rest is ours."""

log = logging.getLogger("nitsum.request")
_fields: ContextVar[dict[str, Any] | None] = ContextVar("log fields", default=None)


def set_up(level: str, log_format: LogFormat) -> None:
    """Log to standard error: our own loggers from `level` on, those of libraries from warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nitsum").setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`2026-11-23T16:42:44.123Z INFO nitsum.request POST / 200 tier=flex ...`"""

    def format(self, record: logging.LogRecord) -> str:
        words = [_utc(record.created), record.levelname, record.name, record.getMessage()]
        words += [f"{name}={value}" for name, value in _extras(record).items()]
        return "\n".join([" ".join(words), *self._trace(record)])

    def _trace(self, record: logging.LogRecord) -> list[str]:
        return [self.formatException(record.exc_info)] if record.exc_info else []


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _utc(at_s: float) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s))
    return f"{seconds}.{int(at_s % 1 * 1000):03d}Z"


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and value is not None
    }


def note(**fields: Any) -> None:
    """Add to the line of the request that is being served; numbers add up over its answers."""
    known = _fields.get()
    if known is None:
        return
    for name, value in fields.items():
        adds_up = isinstance(value, int) and name in known
        known[name] = known[name] + value if adds_up else value


class RequestLog:
    """ASGI middleware: writes a request's line when its response has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found: dict[str, Any] = {}
        _fields.set(found)
        started_s = now_s()
        status = 499  # the client went away before there was a response
        request_id = None

        async def send_and_look(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status, request_id = message["status"], _request_id(message)
            await send(message)

        offer_direct_send(scope, send)
        try:
            await self._app(scope, receive, send_and_look)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            _write(scope, status, request_id, now_s() - started_s, found)


def _request_id(message: Message) -> str | None:
    headers = dict(message["headers"])
    return headers.get(b"x-request-id", b"").decode("latin-1") or None


def _write(
    scope: Scope, status: int, request_id: str | None, seconds: float, found: dict[str, Any]
) -> None:
    path: str = scope["path"]
    level = logging.DEBUG if path == "/" or path.startswith(_QUIET) else logging.INFO
    log.log(
        level,
        "%s %s %d",
        scope["method"],
        # Escaped: a path may hold line breaks, and a line of a log is a line.
        path.encode("unicode_escape").decode("ascii"),
        status,
        extra={
            "request_id": request_id or scope.get("nitsum.request_id"),
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            **found,
        },
    )
