"""Tool calls in an answer's text, found while it streams.

Two notations are known: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the
answer (Hermes, Qwen), and an answer that is nothing but such objects (Llama 3). A call is handed
out when it is complete, or with its arguments so far where the answer was cut off; what looks like
one and is none stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any, cast

from nitsum.server.shapes import FunctionCall, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_SEPARATORS = " \t\r\n;,"
# A call up to where it was cut off: within its arguments, or before them but with its whole name.
_BEGUN = re.compile(
    r'\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*'
    r'(?:,\s*"(?:arguments|parameters)"\s*:\s*(?P<arguments>\{.*)|(?:,\s*(?:"\w*"?\s*:?\s*)?)?)',
    re.DOTALL,
)

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

    def flush(self, *, cut: bool) -> list[Part]:
        """The rest, at the end of the answer; `cut` where it might have gone on."""
        rest, self._buffer = self._buffer, ""
        if self.done:
            return []
        calls: list[ToolCall] = []
        if self._in_call:
            inside = rest[len(_OPEN) :]
            whole = inside[: len(inside) - _overlap(inside, _CLOSE)]
            calls = self._calls(whole) or self._calls(inside, cut=cut)
        elif self._bare:
            calls = self._calls(rest, cut=cut)
        return self._count(calls) or ([rest] if rest else [])

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

    def _calls(self, text: str, *, cut: bool = False) -> list[ToolCall]:
        """The calls `text` consists of; none when any of it is something else.

        With `cut`, the last one may be incomplete.
        """
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        text = text.lstrip(_SEPARATORS)
        while text:
            try:
                value, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                begun = self._begun(text) if cut else None
                return [] if begun is None else [*calls, begun]
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
        return None if arguments is None else _new_call(name, arguments)

    def _begun(self, text: str) -> ToolCall | None:
        """The call that `text` is the beginning of, with what there is of its arguments."""
        found = _BEGUN.fullmatch(text)
        if found is None or (name := _string(found["name"])) not in self._names:
            return None
        return _new_call(name, _arguments_so_far(found["arguments"] or ""))


def _new_call(name: str, arguments: str) -> ToolCall:
    return ToolCall(f"call_{secrets.token_hex(12)}", FunctionCall(name, arguments))


def _string(quoted: str) -> str | None:
    try:
        return json.loads(quoted)
    except ValueError:
        return None


def _arguments_so_far(text: str) -> str:
    """As JSON writes them if they are whole, else as the model began to."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return text
    return json.dumps(value, ensure_ascii=False)


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
    return len(text[: len(text) - _overlap(text, _OPEN)].rstrip())


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in lengths if mark.startswith(text[-length:])), 0)


def _append_text(parts: list[Part], text: str) -> None:
    if text:
        parts.append(text)
