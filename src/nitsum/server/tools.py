"""Tool calls in an answer's text, found while it streams.

Two notations are known: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the
answer (Hermes, Qwen), and an answer that is nothing but such objects (Llama 3). A call is handed
out when it is complete; what looks like one and is none stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any, cast

from nitsum.server.shapes import FunctionCall, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_SEPARATORS = " \t\r\n;,"

Part = str | ToolCall


class ToolCallParser:
    """State of one answer; `names` are the tools the caller offered."""

    def __init__(self, names: Iterable[str], *, parallel: bool = True) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._buffer = ""
        self._in_call = False
        self._bare: bool | None = None
        self.num_calls = 0

    @property
    def done(self) -> bool:
        """The one call that was allowed is complete; the answer ends here."""
        return self.num_calls > 0 and not self._parallel

    def add(self, text: str) -> list[Part]:
        """What became certain with `text`: text and complete calls, in order."""
        self._buffer += text
        if self._bare is None:
            self._bare = _looks_bare(self._buffer)
        if self._bare is not False:
            return []
        parts: list[Part] = []
        while not self.done and self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """The rest, at the end of the answer."""
        rest, self._buffer = self._buffer, ""
        if self.done:
            return []
        calls = self._calls(rest[len(_OPEN) :] if self._in_call else rest)
        if calls and (self._bare or self._in_call):
            return self._count(calls)
        return [rest] if rest else []

    def _step(self, parts: list[Part]) -> bool:
        """Take one text or one call off the buffer; False when nothing more is certain."""
        if self._in_call:
            return self._take_call(parts)
        before, found, after = self._buffer.partition(_OPEN)
        if found:
            # The space between text and call belongs to neither.
            _append_text(parts, before.rstrip())
            self._buffer, self._in_call = found + after, True
            return True
        certain = _certain_length(self._buffer)
        _append_text(parts, self._buffer[:certain])
        self._buffer = self._buffer[certain:]
        return False

    def _take_call(self, parts: list[Part]) -> bool:
        inside, found, after = self._buffer[len(_OPEN) :].partition(_CLOSE)
        if not found:
            return False
        calls = self._calls(inside)
        parts.extend(self._count(calls) if calls else [_OPEN + inside + _CLOSE])
        self._buffer, self._in_call = after, False
        return True

    def _count(self, calls: list[ToolCall]) -> list[Part]:
        allowed = calls if self._parallel else calls[:1]
        self.num_calls += len(allowed)
        return list(allowed)

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls `text` consists of; none when any of it is something else."""
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        text = text.strip(_SEPARATORS)
        while text:
            try:
                value, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                return []
            call = self._call(value)
            if call is None:
                return []
            calls.append(call)
            text = text[end:].lstrip(_SEPARATORS)
        return calls

    def _call(self, value: object) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        fields = cast("dict[str, Any]", value)
        name = fields.get("name")
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = _arguments(fields.get("arguments", fields.get("parameters", {})))
        if arguments is None:
            return None
        return ToolCall(f"call_{secrets.token_hex(12)}", FunctionCall(name, arguments))


def _arguments(value: object) -> str | None:
    """Arguments as JSON text; some models write the object itself, some its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _looks_bare(text: str) -> bool | None:
    """Whether an answer that begins like this may be nothing but calls; None: cannot say yet."""
    start = text.lstrip()
    return start.startswith("{") if start else None


def _certain_length(text: str) -> int:
    """How much of `text` can neither begin a call nor be the space before one."""
    end = len(text)
    for length in range(min(len(_OPEN) - 1, end), 0, -1):
        if _OPEN.startswith(text[-length:]):
            end -= length
            break
    return len(text[:end].rstrip())


def _append_text(parts: list[Part], text: str) -> None:
    if text:
        parts.append(text)
