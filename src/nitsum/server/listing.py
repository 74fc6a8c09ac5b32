"""Pages of things with ids, as OpenAI's API lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from starlette.datastructures import QueryParams

from nitsum.errors import bad_request


class HasId(Protocol):
    @property
    def id(self) -> str: ...


ItemT = TypeVar("ItemT", bound=HasId)


def page_of(
    items: Sequence[ItemT], params: QueryParams, *, usual: int, most: int
) -> tuple[list[ItemT], bool]:
    """The items after `after`, at most `limit` of them, and whether there are more."""
    text = params.get("limit", str(usual))
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0
    if not 1 <= limit <= most:
        raise bad_request(f"limit is 1 to {most}.", "limit")
    after = params.get("after")
    start = 0 if after is None else _place(items, after) + 1
    return list(items[start : start + limit]), len(items) > start + limit


def _place(items: Sequence[HasId], after: str) -> int:
    for place, item in enumerate(items):
        if item.id == after:
            return place
    raise bad_request(f"after: there is no {after!r}.", "after")


def list_body(shown: Sequence[dict[str, object]], more: bool) -> dict[str, object]:
    return {
        "object": "list",
        "data": list(shown),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": more,
    }
