"""The lines of a batch: what goes in is checked, what comes out is written."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINES = 50_000
_MAX_TOLD = 100
"""Errors of one file that are told."""


class InputLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class LineError(msgspec.Struct):
    """What is wrong with a line (the first is 1), or with the whole file (None)."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class LineFailure(msgspec.Struct):
    code: str
    message: str


class LineResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class OutputLine(msgspec.Struct):
    id: str
    custom_id: str
    response: LineResponse | None
    error: LineFailure | None = None


class _Finished(msgspec.Struct):
    custom_id: str


_input = msgspec.json.Decoder(InputLine)
_finished = msgspec.json.Decoder(_Finished)


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def check_lines(path: Path, endpoint: str) -> tuple[int, list[LineError]]:
    """How many lines a batch's file has, and what is wrong with them."""
    seen: set[str] = set()
    errors: list[LineError] = []
    count = 0
    for number, line in lines_of(path):
        count += 1
        error = _check_line(line, endpoint, seen)
        if error is not None:
            error.line = number
            errors.append(error)
        if len(errors) >= _MAX_TOLD or count > MAX_LINES:
            break
    if not count:
        errors.append(LineError("empty_file", "The file has no lines."))
    if count > MAX_LINES:
        errors.append(LineError("too_many_lines", f"A batch has at most {MAX_LINES} lines."))
    return count, errors


def _check_line(line: bytes, endpoint: str, seen: set[str]) -> LineError | None:
    try:
        parsed = _input.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_json_line", f"The line cannot be used: {error}.")
    if parsed.custom_id in seen:
        return LineError("duplicate_custom_id", "custom_id must be unique.", param="custom_id")
    seen.add(parsed.custom_id)
    if parsed.method != "POST":
        return LineError("invalid_method", "method must be POST.", param="method")
    if parsed.url != endpoint:
        return LineError("mismatched_endpoint", f"url must be {endpoint}.", param="url")
    if parsed.body.get("stream"):
        return LineError("invalid_stream", "A batch cannot stream.", param="body.stream")
    return None


def parse_line(line: bytes) -> InputLine:
    """A line that `check_lines` has accepted."""
    return _input.decode(line)


def finished_id(line: bytes) -> str:
    """The `custom_id` of a line that was written."""
    return _finished.decode(line).custom_id


def answered(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    response = LineResponse(status, request_id, msgspec.Raw(body))
    return _encode(OutputLine(_new_id(), custom_id, response))


def unanswered(custom_id: str, code: str, message: str) -> bytes:
    return _encode(OutputLine(_new_id(), custom_id, None, LineFailure(code, message)))


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _encode(line: OutputLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"
