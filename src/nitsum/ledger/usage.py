"""Usage by time: OpenAI's buckets, summed by the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from nitsum.ledger.store import RECORDS, Store

UsageKind = Literal["completions", "embeddings"]
_EMBEDDINGS = "/v1/embeddings"
GROUPS = {
    "service_tier": RECORDS.c.tier_served,
    "api_key_id": RECORDS.c.key_id,
    "model": RECORDS.c.model,
    "batch": RECORDS.c.batch_id.is_not(None),
}


@dataclass(frozen=True)
class UsageQuery:
    """Which records, cut into `num_buckets` of `width_s` from `start_s` on (Unix seconds)."""

    start_s: int
    end_s: int
    width_s: int
    num_buckets: int
    group_by: tuple[str, ...] = ()
    tenant: str | None = None
    """None: everybody's."""
    models: tuple[str, ...] = ()
    key_ids: tuple[str, ...] = ()
    batch: bool | None = None
    kind: UsageKind = "completions"


@dataclass(frozen=True)
class UsageSum:
    """One bucket's sums for one value of each group."""

    groups: dict[str, Any]
    num_input: int
    num_output: int
    num_cached: int
    num_requests: int


def read_usage(store: Store, query: UsageQuery) -> dict[int, list[UsageSum]]:
    """Sums by bucket start (Unix seconds) of what was billed; buckets without any are left out."""
    since_ms, width_ms = query.start_s * 1000, query.width_s * 1000
    until_s = min(query.end_s, query.start_s + query.width_s * query.num_buckets)
    bucket = RECORDS.c.at_ms - (RECORDS.c.at_ms - since_ms) % width_ms
    keys = [bucket.label("bucket"), *(GROUPS[name].label(f"by_{name}") for name in query.group_by)]
    selected = (
        sa.select(*keys, *_sums())
        .where(*_filters(query, since_ms, until_s * 1000))
        # By position: PostgreSQL does not take equal expressions with parameters for one.
        .group_by(*(sa.text(str(place + 1)) for place in range(len(keys))))
        .order_by(*(sa.text(str(place + 1)) for place in range(len(keys))))
    )
    found: dict[int, list[UsageSum]] = {}
    for row in store.rows(selected):
        found.setdefault(int(row["bucket"]) // 1000, []).append(_sum_of(row, query.group_by))
    return found


def _sums() -> Sequence[sa.ColumnElement[Any]]:
    c = RECORDS.c
    return (
        sa.func.sum(c.num_prompt).label("num_input"),
        sa.func.sum(c.num_output).label("num_output"),
        sa.func.sum(c.num_cached).label("num_cached"),
        sa.func.count().label("num_requests"),
    )


def _filters(query: UsageQuery, since_ms: int, until_ms: int) -> list[sa.ColumnElement[bool]]:
    c = RECORDS.c
    found: list[sa.ColumnElement[bool]] = [c.billed, c.at_ms >= since_ms, c.at_ms < until_ms]
    embeds = c.endpoint == _EMBEDDINGS
    found.append(embeds if query.kind == "embeddings" else sa.not_(embeds))
    if query.tenant is not None:
        found.append(c.tenant == query.tenant)
    if query.models:
        found.append(c.model.in_(query.models))
    if query.key_ids:
        found.append(c.key_id.in_(query.key_ids))
    if query.batch is not None:
        found.append(c.batch_id.is_not(None) if query.batch else c.batch_id.is_(None))
    return found


def _sum_of(row: dict[str, Any], groups: Sequence[str]) -> UsageSum:
    values = {name: row[f"by_{name}"] for name in groups}
    if "batch" in values:
        values["batch"] = bool(values["batch"])
    sums = ("num_input", "num_output", "num_cached", "num_requests")
    return UsageSum(values, *(int(row[name]) for name in sums))
