"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.errors import bad_request
from nitsum.server.answer import Answer, Piece, TokenScore
from nitsum.server.chunks import BLANK, Blank, ChunkUsage
from nitsum.server.fields import check_common, room_for_answer, sampling_params, stop_strings
from nitsum.server.generation import engine_requests, new_id
from nitsum.server.job import Job
from nitsum.server.respond import respond
from nitsum.server.schema import COMPLETION_REFUSED, CompletionBody, parse_body
from nitsum.server.service import Service, read_body, service_of
from nitsum.server.shapes import Completion, CompletionChoice, CompletionLogprobs, Usage
from nitsum.server.tokenizer import NoTokenizer, TextCodec, no_tokenizer


async def completions(http: HttpRequest) -> Response:
    """Tokenize, generate, answer."""
    service = service_of(http)
    body = parse_body(await read_body(http), CompletionBody, COMPLETION_REFUSED)
    service.check_model(body.model)
    service.check_accepting()
    check_common(body, service.limits)
    _check_combinations(body, service.codec)
    prompts = await _prompts(service, body)
    job = _job(http, service, body, [tokens for tokens, _ in prompts])
    echoes = [text for _, text in prompts] if body.echo else []
    shape = CompletionShape(service.codec, body, echoes)
    return await respond(http, service, body, job, shape)


def _check_combinations(body: CompletionBody, codec: TextCodec) -> None:
    if body.best_of not in (None, body.n or 1):
        raise bad_request(
            "best_of other than n is not supported by this server. Leave it out.",
            "best_of",
            "unsupported_parameter",
        )
    if body.echo and body.logprobs is not None:
        raise bad_request(
            "echo together with logprobs is not supported by this server: it does not compute "
            "log-probabilities of prompts.",
            "echo",
            "unsupported_parameter",
        )
    if body.stop and isinstance(codec, NoTokenizer):
        raise no_tokenizer("stop")


async def _prompts(service: Service, body: CompletionBody) -> list[tuple[list[int], str]]:
    """Tokens and text of each prompt."""
    prompts = split_prompts(body.prompt)
    if len(prompts) * (body.n or 1) > service.settings.max_choices:
        raise bad_request(
            f"Prompts times n must be at most {service.settings.max_choices}. Send fewer.", "prompt"
        )
    found: list[tuple[list[int], str]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens = await service.encode(prompt, add_special_tokens=True, param="prompt")
            found.append((service.check_prompt(tokens, "prompt"), prompt))
        else:
            tokens = service.check_prompt(prompt, "prompt")
            found.append((tokens, service.codec.decode(prompt) if body.echo else ""))
    return found


def split_prompts(
    prompt: str | list[str | int | list[int]] | None, param: str = "prompt"
) -> list[str | list[int]]:
    """One text or list of ids, or a list of either, as a list of prompts."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    kinds = set(map(type, prompt))
    if kinds <= {int}:
        return [cast("list[int]", prompt)]
    if len(kinds) > 1:
        raise bad_request(
            f"{param} must be a text, a list of token ids, or a list of only one of these.", param
        )
    return cast("list[str | list[int]]", prompt)


def _job(
    http: HttpRequest, service: Service, body: CompletionBody, prompts: Sequence[list[int]]
) -> Job:
    caller = service.caller(http, body)
    num_copies = body.n or 1
    rooms = [room_for_answer(len(prompt), service.limits, "prompt") for prompt in prompts]
    params = [sampling_params(body, room, service.limits) for room in rooms]
    job_id = new_id("cmpl")
    requests = engine_requests(job_id, prompts, params, num_copies, caller, body.priority or 0)
    stops = stop_strings(body)
    skip = body.skip_special_tokens is not False
    answers = [
        Answer(i, request, service.codec.detokenizer(skip_special_tokens=skip), stops=stops)
        for i, request in enumerate(requests)
    ]
    return Job(job_id, service.model_name, caller, answers, service.tiers, num_copies)


class CompletionShape:
    """Completions and their chunks. `echoes` are the prompts' texts when they are wanted back."""

    def __init__(self, codec: TextCodec, body: CompletionBody, echoes: Sequence[str]) -> None:
        self._codec = codec
        self._num_top = body.logprobs
        self._with_ids = bool(body.return_token_ids) or isinstance(codec, NoTokenizer)
        self._num_copies = body.n or 1
        self._echoes = echoes
        self._begun: set[int] = set()

    def whole(self, job: Job, found: Mapping[int, list[Piece]]) -> msgspec.Struct:
        choices = [self._choice(_joined(found[index])) for index in sorted(found)]
        return Completion(job.id, job.created, job.model, choices, job.tier, job.usage())

    def chunks(self, job: Job, piece: Piece, usage: ChunkUsage) -> Iterator[msgspec.Struct]:
        is_first = piece.index not in self._begun
        news = piece.has_news or (self._with_ids and piece.tokens) or (is_first and self._echoes)
        if news or piece.finish_reason is not None:
            tier = job.answers[piece.index].tier
            choice = self._choice(piece)
            yield Completion(job.id, job.created, job.model, [choice], tier, usage)

    def form(self, job: Job, index: int, usage: Blank | ChunkUsage) -> msgspec.Struct | None:
        if self._with_ids or (self._echoes and index not in self._begun):
            return None
        choice = CompletionChoice(index, BLANK)
        return Completion(job.id, job.created, job.model, [choice], job.answers[index].tier, usage)

    def last_chunk(self, job: Job, usage: Usage) -> msgspec.Struct:
        return Completion(job.id, job.created, job.model, [], job.tier, usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        text = piece.text
        if self._echoes and piece.index not in self._begun:
            text = self._echoes[piece.index // self._num_copies] + text
        self._begun.add(piece.index)
        return CompletionChoice(
            piece.index,
            text,
            self._logprobs(piece.scores),
            piece.finish_reason,
            piece.tokens if self._with_ids else UNSET,
        )

    def _logprobs(self, scores: Sequence[TokenScore]) -> CompletionLogprobs | None:
        if self._num_top is None:
            return None
        return CompletionLogprobs(
            [self._text(score.token) for score in scores],
            [score.logprobs.logprob for score in scores],
            [self._tops(score) for score in scores] if self._num_top else None,
            [score.offset for score in scores],
        )

    def _tops(self, score: TokenScore) -> dict[str, float]:
        """The most likely tokens, and the drawn one, which may be none of them."""
        found = score.logprobs
        tops = {
            self._text(token): value
            for token, value in zip(found.top_ids, found.top_logprobs, strict=True)
        }
        return {**tops, self._text(score.token): found.logprob}

    def _text(self, token: int) -> str:
        raw = self._codec.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # Part of a character; OpenAI's notation keeps such tokens apart.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [],
        [token for piece in pieces for token in piece.tokens],
        [score for piece in pieces for score in piece.scores],
        pieces[-1].finish_reason,
    )
