"""`/v1/embeddings`: the model's last state at the last token of each input, of length 1."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.errors import ApiError, bad_request
from nitsum.messages import Output
from nitsum.request import Request, SamplingParams
from nitsum.server.answer import Answer, Piece
from nitsum.server.completions import split_prompts
from nitsum.server.fields import check_range, room_for_answer
from nitsum.server.generation import engine_requests, new_id, pieces
from nitsum.server.job import Job
from nitsum.server.respond import json_response
from nitsum.server.schema import EMBEDDING_REFUSED, EmbeddingBody, parse_body
from nitsum.server.service import Service, read_body, service_of
from nitsum.server.shapes import Embedding, Embeddings, EmbeddingUsage
from nitsum.server.sse import until_disconnect
from nitsum.server.tokenizer import TextCodec

MAX_INPUTS = 2048
"""Of one call, as OpenAI has it."""
BACKGROUND = "flex"
"""What `auto` means here, where there is such a tier: nobody watches an index grow."""
_ORDER_MAX = 2**31 - 1


class State(Answer):
    """An answer without tokens: the state its prompt ends in."""

    def __init__(self, index: int, request: Request, codec: TextCodec) -> None:
        super().__init__(index, request, codec.detokenizer(skip_special_tokens=True))
        self.vector = array("f")

    def add(self, output: Output) -> Piece:
        self.note(output)
        if output.hidden is None:
            raise ApiError("The engine gave no embedding; please report it.", status=500)
        self.vector = array("f", output.hidden)
        return Piece(self.index, finish_reason="stop")


async def embeddings(http: HttpRequest) -> Response:
    """Tokenize, compute, scale to length 1."""
    service = service_of(http)
    body = parse_body(await read_body(http), EmbeddingBody, EMBEDDING_REFUSED)
    service.check_model(body.model)
    service.check_accepting()
    _check(service, body)
    prompts = [await _prompt(service, one) for one in _inputs(body)]
    job, states = _job(http, service, body, prompts)
    work = _run(pieces(service.engine, job, service.metrics, service.books))
    await until_disconnect(http.receive, work)
    return json_response(_response(job, states, body.encoding_format or "float"), job.headers())


def _check(service: Service, body: EmbeddingBody) -> None:
    if body.encoding_format not in (None, "float", "base64"):
        raise bad_request("encoding_format is float or base64.", "encoding_format")
    check_range(body.priority, "priority", -_ORDER_MAX, _ORDER_MAX)


def _inputs(body: EmbeddingBody) -> list[str | list[int]]:
    inputs = split_prompts(body.input, "input")
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise bad_request(f"Give 1 to {MAX_INPUTS} inputs, not {len(inputs)}.", "input")
    if not all(inputs):
        raise bad_request("An input is empty. Leave it out.", "input")
    return inputs


async def _prompt(service: Service, one: str | list[int]) -> list[int]:
    if isinstance(one, str):
        one = await service.encode(one, add_special_tokens=True, param="input")
    return service.check_prompt(one, "input")


def _job(
    http: HttpRequest, service: Service, body: EmbeddingBody, prompts: list[list[int]]
) -> tuple[Job, list[State]]:
    tiers, default = service.tiers, service.settings.default_tier
    auto = BACKGROUND if BACKGROUND in tiers else default
    caller = service.caller(http, body, auto)
    for prompt in prompts:
        room_for_answer(len(prompt), service.limits, "input")
    # The engine's requests draw a token; one is drawn and thrown away.
    params = [SamplingParams(max_tokens=1, temperature=0.0, return_hidden=True)] * len(prompts)
    job_id = new_id("embd")
    requests = engine_requests(job_id, prompts, params, 1, caller, body.priority or 0)
    states = [State(i, request, service.codec) for i, request in enumerate(requests)]
    return Job(job_id, service.model_name, caller, [*states], tiers), states


async def _run(stream: AsyncGenerator[Piece, None]) -> None:
    async with aclosing(stream):
        async for _ in stream:
            pass


def _response(job: Job, states: list[State], encoding: str) -> Embeddings:
    write = _as_base64 if encoding == "base64" else list[float]
    data = [Embedding(state.index, write(scaled(state.vector))) for state in states]
    num_prompt = job.usage().prompt_tokens
    return Embeddings(data, job.model, EmbeddingUsage(num_prompt, num_prompt), job.tier)


def scaled(vector: array[float]) -> array[float]:
    """The same direction, of length 1; zeros stay zeros."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return array("f", (value / length for value in vector)) if length else vector


def _as_base64(vector: array[float]) -> str:
    """Little-endian float32, as clients read it; so is every machine we run on."""
    return base64.b64encode(vector.tobytes()).decode()
