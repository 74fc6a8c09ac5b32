"""Chat messages as a template reads them, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from nitsum.errors import ApiError, bad_request
from nitsum.server.schema import ChatBody, ContentPart, Message, Tool, ToolCallInput
from nitsum.server.template import RESERVED_NAMES, ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool")


def template_messages(messages: Sequence[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """The dictionaries a template gets; raises `ApiError` (400) that names the field."""
    if not messages:
        raise bad_request("messages must not be empty.", "messages")
    return [
        _template_message(message, template, f"messages[{place}]")
        for place, message in enumerate(messages)
    ]


def _template_message(message: Message, template: ChatTemplate, where: str) -> dict[str, Any]:
    _check_message(message, where)
    role = message.role
    if role == "developer" and not template.knows_developer:
        role = "system"
    shown: dict[str, Any] = {"role": role, "content": _content(message.content, f"{where}.content")}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            shown[name] = value
    if message.tool_calls:
        shown["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{place}]")
            for place, call in enumerate(message.tool_calls)
        ]
    return shown


def _check_message(message: Message, where: str) -> None:
    if message.role not in ROLES:
        raise bad_request(
            f"Unknown role {message.role!r}. Use one of: {', '.join(ROLES)}.", f"{where}.role"
        )
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            raise _unsupported(f"{name!r} in a message", f"{where}.{name}")
    if message.content is None and not message.tool_calls:
        raise bad_request("A message needs content (or tool_calls).", f"{where}.content")


def _content(content: str | list[ContentPart] | None, where: str) -> str:
    """Text as it is, text parts on lines of their own, and an empty text for null."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise _unsupported(f"Content of type {part.type!r}", f"{where}.type")
    if part.text is None:
        raise bad_request("A text part needs 'text'.", f"{where}.text")
    return part.text


def _tool_call(call: ToolCallInput, where: str) -> dict[str, Any]:
    """With arguments as an object, which is what templates write out."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        arguments = _parse_arguments(arguments, f"{where}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    shown: dict[str, Any] = {"type": "function", "function": function}
    return shown if call.id is None else {"id": call.id, **shown}


def _parse_arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise bad_request("Tool call arguments must be a JSON object, as text.", where) from None
    return arguments


def offered_tools(body: ChatBody, template: ChatTemplate) -> list[Tool]:
    """The tools the model may call in this answer; raises a 400 for what cannot be kept."""
    tools = body.tools or []
    for place, tool in enumerate(tools):
        _check_tool(tool, f"tools[{place}]")
    if body.tool_choice == "none":
        return []
    forced_tools(body)
    if body.tool_choice is not None and not tools:
        raise bad_request("tool_choice needs tools.", "tool_choice")
    if tools and not template.takes_tools:
        raise bad_request(
            "This model's chat template has no place for tools. Use a model made for tool calls.",
            "tools",
            "unsupported_parameter",
        )
    return tools


def forced_tools(body: ChatBody) -> list[str] | None:
    """Names of the tools of which the answer must call one; None where it may do without."""
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools or [] if tool.function is not None]
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return names
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise _unsupported(f"tool_choice {json.dumps(choice)}", "tool_choice")
    function = choice.get("function")
    name = cast("dict[str, object]", function).get("name") if isinstance(function, dict) else None
    if name not in names:
        raise bad_request("tool_choice names no tool of this call.", "tool_choice")
    return [str(name)]


def _check_tool(tool: Tool, where: str) -> None:
    if tool.type != "function" or tool.function is None:
        raise _unsupported(f"A tool of type {tool.type!r} (without a function)", f"{where}.type")


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Tools as templates write them out, without the fields the caller left out."""
    return [_template_tool(tool) for tool in tools] or None


def _template_tool(tool: Tool) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(tool.function)
    return {"type": "function", "function": {k: v for k, v in fields.items() if v is not None}}


def template_variables(body: ChatBody) -> dict[str, Any]:
    """The caller's `chat_template_kwargs`."""
    variables = body.chat_template_kwargs or {}
    taken = RESERVED_NAMES & variables.keys()
    if taken:
        raise bad_request(
            f"{min(taken)!r} cannot be set through chat_template_kwargs.", "chat_template_kwargs"
        )
    return variables


def _unsupported(what: str, param: str) -> ApiError:
    return bad_request(f"{what} is not supported by this server.", param, "unsupported_parameter")
