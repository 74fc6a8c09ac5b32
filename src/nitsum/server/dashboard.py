"""The dashboard at `/`: one self-contained page, and the state that it (and `nitsum top`) shows.

The page holds no secret and may be read by anybody; the state is an admin's.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cache
from importlib.resources import files
from typing import cast

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from nitsum.server.respond import json_response
from nitsum.server.sampler import Sampler
from nitsum.server.sse import EventStream, event


async def page(http: HttpRequest) -> Response:
    """The page; it loads nothing else, and a policy says so to the browser."""
    text, policy = _page()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    text = files("nitsum.server").joinpath("dashboard.html").read_text(encoding="utf-8")
    script, style = (_hashes(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hashes(text: str, tag: str) -> str:
    """Sources of a policy that allow exactly the page's own inline elements."""
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(element.encode()).digest() for element in inline)
    return " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)


async def state(http: HttpRequest) -> Response:
    """The state with the history of the last minutes."""
    return json_response(await _sampler(http).snapshot())


async def stream(http: HttpRequest) -> Response:
    """The same as server-sent events: once with the history, then every second without."""
    return EventStream(_events(_sampler(http)), dict)


async def _events(sampler: Sampler) -> AsyncGenerator[bytes, None]:
    async with aclosing(sampler.states()) as states:
        async for one in states:
            yield event(one)


def _sampler(http: HttpRequest) -> Sampler:
    return cast(Sampler, http.app.state.sampler)


ROUTES = (
    Route("/", page),
    Route("/admin/state", state),
    Route("/admin/state/stream", stream),
)
