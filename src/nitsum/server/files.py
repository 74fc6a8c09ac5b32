"""`/v1/files`: JSONL for batches, and what came out of them."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response
from starlette.types import Message

from nitsum.errors import ApiError, bad_request
from nitsum.server.datafolder import DataFolder
from nitsum.server.listing import list_body, page_of
from nitsum.server.respond import json_response
from nitsum.server.service import service_of, tenant_of

_MAX_FILES = 10_000
"""Of one tenant."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file. `created_at` is Unix seconds."""

    id: str
    tenant: str
    filename: str
    bytes: int
    created_at: int
    purpose: str


class FileStore:
    """The files of a data folder, oldest first."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        found = folder.load_all("files", FileRecord)
        found.sort(key=lambda file: (file.created_at, file.id))
        self._files = {file.id: file for file in found}

    def of_tenant(self, tenant: str) -> list[FileRecord]:
        return [file for file in self._files.values() if file.tenant == tenant]

    def get(self, file_id: str, tenant: str) -> FileRecord:
        """Raises a 404 also for files of others."""
        file = self._files.get(file_id)
        if file is None or file.tenant != tenant:
            raise ApiError(f"There is no file {file_id!r}.", status=404, param="file_id")
        return file

    def publish(self, file_id: str, tenant: str, filename: str, purpose: str) -> FileRecord:
        """Make the data that lies under `file_id` a file of the API."""
        size = self.folder.data_path(file_id).stat().st_size
        file = FileRecord(
            id=file_id,
            tenant=tenant,
            filename=filename,
            bytes=size,
            created_at=int(time.time()),
            purpose=purpose,
        )
        self.folder.save("files", file_id, file)
        self._files[file_id] = file
        return file

    def delete(self, file: FileRecord) -> None:
        self._files.pop(file.id, None)
        self.folder.remove_file(file.id)


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


async def create(http: HttpRequest) -> Response:
    """Take an upload (multipart: `file`, `purpose`)."""
    store = service_of(http).work.files
    tenant = tenant_of(http)
    if len(store.of_tenant(tenant)) >= _MAX_FILES:
        raise bad_request(f"You have {_MAX_FILES} files already. Delete some.", "file")
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError("Send multipart/form-data with file and purpose.", status=415)
    limited = HttpRequest(http.scope, _Limited(http))
    async with limited.form(max_files=1, max_fields=8) as form:
        _check_fields(form.get("purpose"), [name for name in form if name.startswith("expires")])
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise bad_request("Missing required field 'file'.", "file")
        file_id = new_file_id()
        await asyncio.to_thread(_keep, store, file_id, upload)
        name = (upload.filename or "upload.jsonl")[:255]
    return json_response(shown(store.publish(file_id, tenant, name, "batch")))


def _check_fields(purpose: object, expires: list[str]) -> None:
    if purpose != "batch":
        raise bad_request("purpose must be 'batch': this server has no other use.", "purpose")
    if expires:
        raise bad_request(
            "expires_after is not supported by this server. Leave it out.",
            "expires_after",
            "unsupported_parameter",
        )


def _keep(store: FileStore, file_id: str, upload: UploadFile) -> None:
    with store.folder.data_path(file_id).open("wb") as kept:
        shutil.copyfileobj(upload.file, kept)


class _Limited:
    """`receive` of an upload; raises a 413 as soon as it is too large."""

    def __init__(self, http: HttpRequest) -> None:
        self._receive = http.receive
        self._left = self._most = service_of(http).settings.max_file_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise ApiError(f"The file is larger than {self._most} bytes. Send less.", status=413)
        return message


async def list_files(http: HttpRequest) -> Response:
    files = service_of(http).work.files.of_tenant(tenant_of(http))
    purpose = http.query_params.get("purpose")
    wanted = [file for file in files if purpose in (None, file.purpose)]
    order = http.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_request("order is asc or desc.", "order")
    page, more = page_of(
        wanted if order == "asc" else wanted[::-1], http.query_params, usual=10_000, most=10_000
    )
    return json_response(list_body([shown(file) for file in page], more))


async def retrieve(http: HttpRequest) -> Response:
    return json_response(shown(_file(http)))


async def content(http: HttpRequest) -> Response:
    file = _file(http)
    path = service_of(http).work.files.folder.data_path(file.id)
    return FileResponse(path, media_type="application/jsonl")


async def delete(http: HttpRequest) -> Response:
    file = _file(http)
    work = service_of(http).work
    if work.batches.reads(file.id):
        raise ApiError("A batch still reads this file. Cancel it first.", status=409)
    work.files.delete(file)
    return json_response({"id": file.id, "object": "file", "deleted": True})


def _file(http: HttpRequest) -> FileRecord:
    return service_of(http).work.files.get(http.path_params["file_id"], tenant_of(http))


def shown(file: FileRecord) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(file)
    del fields["tenant"]
    return {**fields, "object": "file", "status": "processed", "expires_at": None}
