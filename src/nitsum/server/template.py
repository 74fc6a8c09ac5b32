"""Chat templates: the checkpoint's jinja template, rendered as `transformers` renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from nitsum.errors import CheckpointError, bad_request

RESERVED_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; for serving its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `special_tokens` are its variables `bos_token`, `eos_token`, ..."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"The chat template cannot be read: {error}.") from error
        self._special_tokens = dict(special_tokens)
        self.takes_tools = "tools" in variables
        self.knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to where the assistant's answer starts.

        Raises `ApiError` (400) with the template's own words when it refuses the messages.
        """
        try:
            return self._template.render(
                **{**self._special_tokens, **(variables or {})},
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise bad_request(
                f"The model's chat template cannot render these messages: {error}", "messages"
            ) from error


def read_chat_template(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template of a checkpoint, or None where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens)
    config = read_json(folder / "tokenizer_config.json")
    source = _pick(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, special_tokens)


def _pick(entry: object) -> str | None:
    """A template, out of one or a list of named ones."""
    if entry is None or isinstance(entry, str):
        return entry
    named = {item["name"]: item["template"] for item in cast("list[dict[str, str]]", entry)}
    return named.get("default") or next(iter(named.values()), None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
