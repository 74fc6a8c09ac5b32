"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.errors import bad_request
from nitsum.request import Request
from nitsum.server.answer import Answer, Piece, TokenScore
from nitsum.server.chunks import BLANK, Blank, ChunkUsage
from nitsum.server.fields import check_common, room_for_answer, sampling_params, stop_strings
from nitsum.server.generation import engine_requests, new_id
from nitsum.server.job import Job
from nitsum.server.messages import (
    offered_tools,
    template_messages,
    template_tools,
    template_variables,
)
from nitsum.server.respond import respond
from nitsum.server.schema import CHAT_REFUSED, ChatBody, Message, Tool, parse_body
from nitsum.server.service import Service, inline_or_thread, read_body, service_of
from nitsum.server.shapes import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from nitsum.server.structured import answer_grammar
from nitsum.server.template import ChatTemplate
from nitsum.server.tokenizer import NoTokenizer, TextCodec, no_tokenizer
from nitsum.server.tools import ToolCallParser


async def chat_completions(http: HttpRequest) -> Response:
    """Render, tokenize, generate, answer."""
    service = service_of(http)
    body = parse_body(await read_body(http), ChatBody, CHAT_REFUSED)
    service.check_model(body.model)
    service.check_accepting()
    check_common(body, service.limits)
    job = await _job(http, service, body)
    return await respond(http, service, body, job, ChatShape(service.codec, body))


async def _job(http: HttpRequest, service: Service, body: ChatBody) -> Job:
    caller = service.caller(http, body)
    template = chat_template(service.codec)
    tools = offered_tools(body, template)
    prompt = await prompt_tokens(
        service, body.messages, tools=tools, variables=template_variables(body)
    )
    room = room_for_answer(len(prompt), service.limits, "messages")
    params = sampling_params(body, room, service.limits)
    grammar = await answer_grammar(service, body, tools)
    if grammar is not None:
        params = msgspec.structs.replace(params, grammar=grammar)
    job_id, num_copies = new_id("chatcmpl"), body.n or 1
    requests = engine_requests(job_id, [prompt], [params], num_copies, caller, body.priority or 0)
    answers = [_answer(i, request, service, body, tools) for i, request in enumerate(requests)]
    return Job(job_id, service.model_name, caller, answers, service.tiers, num_copies)


def _answer(
    index: int, request: Request, service: Service, body: ChatBody, tools: Sequence[Tool]
) -> Answer:
    names = [tool.function.name for tool in tools if tool.function is not None]
    parser = ToolCallParser(names, parallel=body.parallel_tool_calls is not False)
    return Answer(
        index,
        request,
        service.codec.detokenizer(skip_special_tokens=body.skip_special_tokens is not False),
        stops=stop_strings(body),
        tools=parser if names else None,
    )


def chat_template(codec: TextCodec) -> ChatTemplate:
    """The model's template; raises a 400 for models that have none."""
    if isinstance(codec, NoTokenizer):
        raise no_tokenizer("messages")
    if codec.template is None:
        raise bad_request(
            "This model has no chat template. Use /v1/completions instead.", "messages"
        )
    return codec.template


async def prompt_tokens(
    service: Service,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The rendered and tokenized conversation."""
    template = chat_template(service.codec)
    shown = template_messages(messages, template)
    num_chars = sum(len(message["content"]) for message in shown)
    render = partial(template.render, shown, template_tools(tools), variables)
    text = await inline_or_thread(num_chars, render)
    tokens = await service.encode(text, add_special_tokens=False, param="messages")
    return service.check_prompt(tokens, "messages")


class ChatShape:
    """Chat completions and their chunks; remembers which choices have begun."""

    def __init__(self, codec: TextCodec, body: ChatBody) -> None:
        self._codec = codec
        self._with_logprobs = bool(body.logprobs)
        self._with_ids = bool(body.return_token_ids)
        self._begun: set[int] = set()
        self._num_calls: dict[int, int] = {}

    def whole(self, job: Job, found: Mapping[int, list[Piece]]) -> msgspec.Struct:
        choices = [self._choice(index, found[index]) for index in sorted(found)]
        return ChatCompletion(job.id, job.created, job.model, choices, job.usage(), job.tier)

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        text = "".join(piece.text for piece in pieces)
        calls = [call for piece in pieces for call in piece.tool_calls]
        finish = pieces[-1].finish_reason
        assert finish is not None
        return ChatChoice(
            index,
            ChatMessage(text if text or not calls else None, tool_calls=calls or UNSET),
            finish,
            self._logprobs([score for piece in pieces for score in piece.scores]),
            [t for piece in pieces for t in piece.tokens] if self._with_ids else UNSET,
        )

    def chunks(self, job: Job, piece: Piece, usage: ChunkUsage) -> Iterator[msgspec.Struct]:
        make = partial(self._chunk, job, piece.index, usage)
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield make(Delta(role="assistant", content=""))
        if piece.has_news or (self._with_ids and piece.tokens):
            yield make(self._delta(piece), piece)
        if piece.finish_reason is not None:
            choice = ChatChunkChoice(piece.index, Delta(), finish_reason=piece.finish_reason)
            yield self._of_choice(job, choice, usage)

    def form(self, job: Job, index: int, usage: Blank | ChunkUsage) -> msgspec.Struct | None:
        if self._with_ids or index not in self._begun:
            return None
        choice = ChatChunkChoice(index, Delta(content=BLANK))
        return self._of_choice(job, choice, usage)

    def _delta(self, piece: Piece) -> Delta:
        first = self._num_calls.get(piece.index, 0)
        self._num_calls[piece.index] = first + len(piece.tool_calls)
        calls = [
            ToolCallDelta(first + place, call.id, call.function)
            for place, call in enumerate(piece.tool_calls)
        ]
        return Delta(
            content=UNSET if calls and not piece.text else piece.text, tool_calls=calls or UNSET
        )

    def _chunk(
        self, job: Job, index: int, usage: ChunkUsage, delta: Delta, piece: Piece | None = None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index, delta)
        if piece is not None:
            choice.logprobs = self._logprobs(piece.scores)
            choice.token_ids = piece.tokens if self._with_ids else UNSET
        return self._of_choice(job, choice, usage)

    def _of_choice(self, job: Job, choice: ChatChunkChoice, usage: Blank | ChunkUsage) -> ChatChunk:
        tier = job.answers[choice.index].tier
        return ChatChunk(job.id, job.created, job.model, [choice], tier, usage)

    def last_chunk(self, job: Job, usage: Usage) -> msgspec.Struct:
        return ChatChunk(job.id, job.created, job.model, [], job.tier, usage)

    def _logprobs(self, scores: Sequence[TokenScore]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs([self._token_logprob(score) for score in scores])

    def _token_logprob(self, score: TokenScore) -> TokenLogprob:
        found = score.logprobs
        drawn = self._top(score.token, found.logprob)
        tops = [
            self._top(token, value)
            for token, value in zip(found.top_ids, found.top_logprobs, strict=True)
        ]
        return TokenLogprob(drawn.token, drawn.logprob, drawn.bytes, tops)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        raw = self._codec.token_bytes(token)
        return TopLogprob(raw.decode("utf-8", "replace"), logprob, list(raw))
