"""`/v1/organization/usage/...`: the ledger in OpenAI's buckets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from starlette.datastructures import QueryParams
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.errors import ApiError, bad_request
from nitsum.ledger.store import Store
from nitsum.ledger.usage import GROUPS, UsageKind, UsageQuery, UsageSum, read_usage
from nitsum.server.books import Books
from nitsum.server.respond import json_response
from nitsum.server.service import key_of, service_of

# Width -> (seconds, buckets in a page by default, at most), as OpenAI has them.
_WIDTHS = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86_400, 7, 31)}
_UNSUPPORTED = ("project_ids", "user_ids")


async def completions_usage(http: HttpRequest) -> Response:
    """Tokens and calls by time. A caller with a key sees its tenant's, others see everybody's."""
    return await _usage(http, "completions")


async def embeddings_usage(http: HttpRequest) -> Response:
    """The same of embeddings."""
    return await _usage(http, "embeddings")


async def _usage(http: HttpRequest, kind: UsageKind) -> Response:
    books = service_of(http).books
    key = key_of(http)
    query = _query(http.query_params, kind, None if key is None else key.tenant)
    found = await asyncio.to_thread(_read, books, query)
    return json_response(_page(query, found))


def _read(books: Books, query: UsageQuery) -> dict[int, list[UsageSum]]:
    return read_usage(_stored(books), query)


def _stored(books: Books) -> Store:
    """The ledger, with all that has ended before now."""
    if books.store is None or books.writer is None:
        raise ApiError(
            "This server keeps no ledger. Start it with --ledger PATH.",
            status=404,
            code="no_ledger",
        )
    if not books.writer.flush():
        raise ApiError(
            "The ledger cannot be written now, so its sums would be too low. Try again soon.",
            status=503,
            type="server_error",
            retry_after_s=5.0,
        )
    return books.store


def _query(params: QueryParams, kind: UsageKind, tenant: str | None) -> UsageQuery:
    for name in _UNSUPPORTED:
        if _values(params, name):
            raise bad_request(f"{name} means nothing to this server. Leave it out.", name)
    width_s, usual, most = _width(params)
    first_s = _number(params, "start_time", None)
    if first_s is None:
        raise bad_request("start_time is required (Unix seconds).", "start_time")
    return UsageQuery(
        kind=kind,
        start_s=_page_start(params, first_s),
        end_s=_number(params, "end_time", None) or int(time.time()) + 1,
        width_s=width_s,
        num_buckets=_limit(params, usual, most),
        group_by=_groups(params),
        tenant=tenant,
        models=tuple(_values(params, "models")),
        key_ids=tuple(_values(params, "api_key_ids")),
        batch=_boolean(params, "batch"),
    )


def _width(params: QueryParams) -> tuple[int, int, int]:
    name = params.get("bucket_width", "1d")
    if name not in _WIDTHS:
        raise bad_request(f"bucket_width is one of {', '.join(_WIDTHS)}.", "bucket_width")
    return _WIDTHS[name]


def _limit(params: QueryParams, usual: int, most: int) -> int:
    limit = _number(params, "limit", usual)
    if limit is None or not 1 <= limit <= most:
        raise bad_request(f"limit is 1 to {most} for this bucket_width.", "limit")
    return limit


def _page_start(params: QueryParams, first_s: int) -> int:
    page_s = _number(params, "page", first_s)
    assert page_s is not None
    if page_s < first_s:
        raise bad_request("page is next_page of an earlier answer.", "page")
    return page_s


def _groups(params: QueryParams) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_values(params, "group_by")))
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise bad_request(
            f"Cannot group by {unknown[0]!r}; there is {', '.join(GROUPS)}.", "group_by"
        )
    return names


def _values(params: QueryParams, name: str) -> Sequence[str]:
    """A list: `a=1&a=2` or, as OpenAI's clients write it, `a[]=1&a[]=2`."""
    return [*params.getlist(name), *params.getlist(f"{name}[]")]


def _number(params: QueryParams, name: str, default: int | None) -> int | None:
    text = params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise bad_request(f"{name} must be a whole number of at least 0.", name)
    return int(text)


def _boolean(params: QueryParams, name: str) -> bool | None:
    text = params.get(name)
    if text not in (None, "true", "false"):
        raise bad_request(f"{name} must be true or false.", name)
    return None if text is None else text == "true"


def _page(query: UsageQuery, found: dict[int, list[UsageSum]]) -> dict[str, object]:
    ends = query.start_s + query.width_s * query.num_buckets
    starts = range(query.start_s, min(ends, query.end_s), query.width_s)
    more = ends < query.end_s
    return {
        "object": "page",
        "data": [_bucket(query, start, found.get(start, [])) for start in starts],
        "has_more": more,
        "next_page": str(ends) if more else None,
    }


def _bucket(query: UsageQuery, start_s: int, sums: Sequence[UsageSum]) -> dict[str, object]:
    return {
        "object": "bucket",
        "start_time": start_s,
        "end_time": min(start_s + query.width_s, query.end_s),
        "results": [_result(one, query.kind) for one in sums],
    }


def _result(one: UsageSum, kind: UsageKind) -> dict[str, object]:
    names = ("project_id", "user_id", *GROUPS)
    return {
        "object": f"organization.usage.{kind}.result",
        "input_tokens": one.num_input,
        "output_tokens": one.num_output,
        "input_cached_tokens": one.num_cached,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": one.num_requests,
        **{name: one.groups.get(name) for name in names},
    }
