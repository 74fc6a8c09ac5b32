"""`response_format`, strict tools, forced tool calls: grammars that the samplers keep to.

A grammar says what the whole answer looks like. Tool calls are written as Hermes and Qwen write
them, which is what `tools` finds again:

    <tool_call>
    {"name": "NAME", "arguments": ARGUMENTS}
    </tool_call>
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from nitsum.errors import ApiError, bad_request
from nitsum.server.messages import forced_tools
from nitsum.server.schema import ChatBody, FunctionTool, ResponseFormat, Tool
from nitsum.server.service import Service

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# As json.dumps writes it. Free whitespace lets a small model at a high temperature write nothing
# else.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_INLINE_CHARS = 2000
"""Larger grammars are checked in a thread."""


async def answer_grammar(service: Service, body: ChatBody, tools: Sequence[Tool]) -> str | None:
    """The grammar of the answer, None for free text; raises a 400 that names the field."""
    schema = _schema(body.response_format)
    functions = [tool.function for tool in tools if tool.function is not None]
    forced = forced_tools(body) if tools else None
    if schema is None and forced is None and not any(f.strict for f in functions):
        return None
    param = (
        "response_format" if schema is not None else "tools" if forced is None else "tool_choice"
    )
    _check_possible(service, body, param)
    marks = Marks.of(service.codec.added_tokens)
    parallel = body.parallel_tool_calls is not False
    grammar = _grammar(schema, functions, forced, marks, parallel=parallel)
    await _check_grammar(grammar, param)
    return grammar


def _schema(response_format: ResponseFormat | None) -> dict[str, Any] | bool | None:
    """The schema the answer must match."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return _ANY_OBJECT
    if response_format.type != "json_schema":
        raise bad_request(
            "response_format.type is text, json_object or json_schema.", "response_format.type"
        )
    found = response_format.json_schema
    if found is None or found.schema is None:
        raise bad_request(
            "response_format of type json_schema needs json_schema.schema.",
            "response_format.json_schema",
            "missing_required_parameter",
        )
    return found.schema


def _check_possible(service: Service, body: ChatBody, param: str) -> None:
    problem = _missing(service)
    if problem is not None:
        raise _unsupported(f"{param}: {problem}", param)
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name):
            raise _unsupported(
                f"{name} cannot be kept together with {param}: an answer ends where its grammar "
                "does.",
                name,
            )


def _missing(service: Service) -> str | None:
    """Why this server cannot keep to grammars."""
    if find_spec("llguidance") is None:
        return "this server was installed without nitsum[structured]."
    if not (service.settings.checkpoint / "tokenizer.json").is_file():
        return "this model has no tokenizer.json."
    if not service.limits.eos_token_ids:
        return "this model has no end token."
    return None


def _unsupported(message: str, param: str) -> ApiError:
    return bad_request(message, param, "unsupported_parameter")


@dataclass(frozen=True)
class Marks:
    """How the grammar spells the ends of a call: as text, or as the one token each is."""

    opening: str
    closing: str

    @classmethod
    def of(cls, added_tokens: frozenset[str]) -> Marks:
        """llguidance matches added tokens in angle brackets by name, and never as text."""
        names = ("<tool_call>", "</tool_call>")
        return cls(*(name if name in added_tokens else json.dumps(name) for name in names))

    @property
    def is_token(self) -> bool:
        return not self.opening.startswith('"')


def _grammar(
    schema: dict[str, Any] | bool | None,
    functions: Sequence[FunctionTool],
    forced: Sequence[str] | None,
    marks: Marks,
    *,
    parallel: bool,
) -> str:
    """In llguidance's variant of Lark."""
    if forced is not None:
        functions = [function for function in functions if function.name in forced]
    lines = ["%llguidance {}"]
    if not functions:
        lines.append("start: json")
    elif forced is not None:
        lines.append("start: calls")
    elif schema is not None:
        lines.append("start: json | calls")
    else:
        lines += _text_or_calls(marks)
    if schema is not None and forced is None:
        lines.append(f"json: {_json(schema)}")
    if functions:
        lines += _call_rules(functions, marks, parallel)
    return "\n".join(lines) + "\n"


def _text_or_calls(marks: Marks) -> list[str]:
    """Free text, until the model opens a call."""
    # A lazy lexeme ends at the first mark, so that no text can hold one.
    lazy = "" if marks.is_token else "[lazy]"
    return [
        "start: TEXT | opening body more",
        f"opening{lazy}: TEXT {marks.opening}",
        "TEXT: /(.|\\n)*/",
    ]


def _call_rules(functions: Sequence[FunctionTool], marks: Marks, parallel: bool) -> list[str]:
    bodies = " | ".join(f"body_{place}" for place in range(len(functions)))
    rules = [
        "calls: call more",
        f"call: {marks.opening} body",
        'more: ("\\n" call)*' if parallel else 'more: ""',
        f"body: {bodies}",
    ]
    for place, function in enumerate(functions):
        begin = json.dumps(f'\n{{"name": {json.dumps(function.name)}, "arguments": ')
        arguments = _json(function.parameters or _ANY_OBJECT)
        rules.append(f"body_{place}: {begin} {arguments} {json.dumps(_CALL_END)} {marks.closing}")
    return rules


_CALL_END = "}\n"


def _json(schema: dict[str, Any] | bool) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({**schema, "x-guidance": _LAYOUT})


async def _check_grammar(grammar: str, param: str) -> None:
    if len(grammar) <= _MAX_INLINE_CHARS:
        problem = _problem(grammar)
    else:
        problem = await asyncio.to_thread(_problem, grammar)
    if problem is not None:
        raise bad_request(f"{param} cannot be kept to: {problem}", param, "invalid_schema")


def _problem(grammar: str) -> str | None:
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return " ".join(messages[0].split())[:500] if wrong else None
