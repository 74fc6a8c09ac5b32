"""One streamed completion over HTTP, against any OpenAI-compatible server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec

from nitsum.bench.http_stream import Connection, Pool
from nitsum.metrics.targets import Target
from nitsum.workload.items import WorkItem


@dataclass(frozen=True)
class Endpoint:
    """A server under load."""

    url: str
    """Without `/v1`."""
    model: str
    api_key: str | None = None
    sends_tiers: bool = True
    """False leaves `service_tier` out, for servers that refuse it."""


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _ErrorBody(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    service_tier: str | None = None
    error: _ErrorBody | None = None


class Piece(msgspec.Struct):
    """What one server-sent event told."""

    at_s: float
    num_tokens: int
    """Answer tokens that are new with it."""
    token_ids: list[int]
    tier: str | None
    finish_reason: str | None


class StreamRefused(Exception):
    """The server answered with an error status, or an error inside the stream."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_error = msgspec.json.Decoder(dict[str, _ErrorBody], strict=False).decode


async def stream(
    pool: Pool, endpoint: Endpoint, item: WorkItem, prompt: list[int], target: Target
) -> AsyncGenerator[Piece, None]:
    """Send `prompt` and yield what comes back; the server is told how soon it is wanted.

    Raises `StreamRefused`, or `OSError`.
    There is no time-out: a slow answer is a result, not a failure.
    """
    body, headers = _body(endpoint, item, prompt), _headers(endpoint, item, target)
    async with pool.post("/v1/completions", body, headers) as (status, connection):
        if status >= 400:
            raise _refusal(status, await _all(connection))
        num_tokens, rest = 0, b""
        while (data := await connection.body()) is not None:
            at_s = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    piece = _piece(_chunk(line, status), num_tokens, at_s)
                    num_tokens += piece.num_tokens
                    yield piece


async def _all(connection: Connection) -> bytes:
    content = b""
    while (data := await connection.body()) is not None:
        content += data
    return content


def _chunk(line: bytes, status: int) -> _Chunk:
    chunk = _decode_chunk(line[6:])
    if chunk.error is not None:
        raise StreamRefused(status, str(chunk.error.code), chunk.error.message)
    return chunk


def _headers(endpoint: Endpoint, item: WorkItem, target: Target) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "x-request-id": item.request_id}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    if item.tenant:
        headers["x-llm-d-inference-fairness-id"] = item.tenant
    if target.ttft_s is not None:
        headers["x-slo-ttft-ms"] = f"{1e3 * target.ttft_s:.3f}"
    if item.chain is not None:
        headers["x-nitsum-chain-id"] = item.chain.chain_id
        if item.chain.deadline_s is not None:
            left_s = item.chain_start_s + item.chain.deadline_s - item.at_s
            headers["x-nitsum-chain-deadline-ms"] = str(max(1, round(1e3 * left_s)))
    return headers


def _body(endpoint: Endpoint, item: WorkItem, prompt: list[int]) -> bytes:
    """Exactly `num_output` tokens, greedy; usage in every chunk says how many have come."""
    body: dict[str, object] = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": item.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": item.chain is not None,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if endpoint.sends_tiers:
        body["service_tier"] = item.tier
    return msgspec.json.encode(body)


def _piece(chunk: _Chunk, num_before: int, at_s: float) -> Piece:
    choice = chunk.choices[0] if chunk.choices else _Choice()
    if chunk.usage is not None:
        num_new = chunk.usage.completion_tokens - num_before
    else:
        num_new = 1 if choice.text else 0
    return Piece(
        at_s=at_s,
        num_tokens=max(0, num_new),
        token_ids=choice.token_ids or [],
        tier=chunk.service_tier,
        finish_reason=choice.finish_reason,
    )


def _refusal(status: int, content: bytes) -> StreamRefused:
    try:
        error = _decode_error(content)["error"]
    except (msgspec.DecodeError, KeyError):
        return StreamRefused(status, "unknown", content[:200].decode(errors="replace"))
    return StreamRefused(status, str(error.code), error.message)
