"""`/v1/batches`: calls without a hurry, in a file, served as the lowest tier."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.errors import ApiError, bad_request
from nitsum.server.batchlines import ENDPOINTS, LineError
from nitsum.server.datafolder import DataFolder
from nitsum.server.files import new_file_id
from nitsum.server.listing import list_body, page_of
from nitsum.server.respond import json_response
from nitsum.server.schema import parse_body
from nitsum.server.service import key_of, read_body, service_of, tenant_of

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED = ("failed", "completed", "expired", "cancelled")
WINDOW_S = 86_400


class BatchBody(msgspec.Struct, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


_REFUSED: dict[str, tuple[object, ...]] = {"output_expires_after": ()}


class Batch(msgspec.Struct, kw_only=True):
    """A batch as it is kept. Times are Unix seconds; results are under their ids from the start."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    created_at: int
    expires_at: int
    output_id: str
    error_id: str
    status: BatchStatus = "validating"
    reached: dict[str, int] = {}
    """When it came to a status."""
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    errors: list[LineError] = []

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def become(self, status: BatchStatus) -> None:
        self.status = status
        self.reached[status] = int(time.time())


class BatchStore:
    """The batches of a data folder, oldest first."""

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        found = folder.load_all("batches", Batch)
        found.sort(key=lambda batch: (batch.created_at, batch.id))
        self._batches = {batch.id: batch for batch in found}

    def add(self, batch: Batch) -> None:
        self._batches[batch.id] = batch
        self.save(batch)

    def save(self, batch: Batch) -> None:
        self._folder.save("batches", batch.id, batch)

    def become(self, batch: Batch, status: BatchStatus) -> None:
        batch.become(status)
        self.save(batch)

    def of_tenant(self, tenant: str) -> list[Batch]:
        return [batch for batch in self._batches.values() if batch.tenant == tenant]

    def unfinished(self) -> list[Batch]:
        return [batch for batch in self._batches.values() if not batch.ended]

    def reads(self, file_id: str) -> bool:
        return any(batch.input_file_id == file_id for batch in self.unfinished())

    def get(self, batch_id: str, tenant: str) -> Batch:
        batch = self._batches.get(batch_id)
        if batch is None or batch.tenant != tenant:
            raise ApiError(f"There is no batch {batch_id!r}.", status=404, param="batch_id")
        return batch


async def create(http: HttpRequest) -> Response:
    service = service_of(http)
    body = parse_body(await read_body(http), BatchBody, _REFUSED)
    service.check_accepting()
    tenant = tenant_of(http)
    _check(body)
    try:
        service.work.files.get(body.input_file_id, tenant)
    except ApiError as error:
        raise bad_request(error.message, "input_file_id") from None
    key = key_of(http)
    now = int(time.time())
    batch = Batch(
        id=f"batch_{uuid.uuid4().hex}",
        tenant=tenant,
        key_id="" if key is None else key.id,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        metadata=body.metadata,
        created_at=now,
        expires_at=now + WINDOW_S,
        output_id=new_file_id(),
        error_id=new_file_id(),
    )
    service.work.submit(batch)
    return json_response(shown(batch))


def _check(body: BatchBody) -> None:
    if body.endpoint not in ENDPOINTS:
        raise bad_request(f"endpoint is one of {', '.join(ENDPOINTS)}.", "endpoint")
    if body.completion_window != "24h":
        raise bad_request("completion_window is 24h.", "completion_window")


async def list_batches(http: HttpRequest) -> Response:
    found = service_of(http).work.batches.of_tenant(tenant_of(http))
    page, more = page_of(found[::-1], http.query_params, usual=20, most=100)
    return json_response(list_body([shown(batch) for batch in page], more))


async def retrieve(http: HttpRequest) -> Response:
    return json_response(shown(_batch(http)))


async def cancel(http: HttpRequest) -> Response:
    batch = _batch(http)
    if batch.ended:
        raise ApiError(f"The batch is {batch.status} already.", status=409)
    service_of(http).work.cancel(batch)
    return json_response(shown(batch))


def _batch(http: HttpRequest) -> Batch:
    return service_of(http).work.batches.get(http.path_params["batch_id"], tenant_of(http))


def shown(batch: Batch) -> dict[str, Any]:
    """OpenAI's batch object."""
    errors = {"object": "list", "data": msgspec.to_builtins(batch.errors)} if batch.errors else None
    has_results = batch.ended and batch.status != "failed"
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_id if has_results and batch.num_completed else None,
        "error_file_id": batch.error_id if has_results and batch.num_failed else None,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{name}_at": batch.reached.get(name) for name in _TIMED},
        "request_counts": {
            "total": batch.num_lines,
            "completed": batch.num_completed,
            "failed": batch.num_failed,
        },
        "metadata": batch.metadata,
    }


_TIMED = (
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)
