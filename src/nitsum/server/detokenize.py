"""Tokens into text, one at a time, and stop strings found on the way.

Text that is handed out is final: a character that is not complete and text that may turn out to be
part of a stop string are held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"

# A character has at most 4 bytes, and a token or two without text may come before them; more
# tokens that decode to nothing whole are bytes that form no character.
_MAX_PENDING_TOKENS = 8


class Detokenizer(Protocol):
    """State of one answer."""

    def add(self, token: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end; bytes that form no character become U+FFFD."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies: tokens are byte strings, so UTF-8 itself says what is whole."""

    def __init__(
        self, bytes_of: Callable[[int], bytes], text_of: Callable[[int], str | None]
    ) -> None:
        """`text_of` is the text of a token that is whole characters; None for any other."""
        self._bytes_of = bytes_of
        self._text_of = text_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False
        """Inside a character: the decoder holds bytes back."""

    def add(self, token: int) -> str:
        if not self._inside:
            whole = self._text_of(token)
            if whole is not None:
                return whole
        text = self._decoder.decode(self._bytes_of(token))
        self._inside = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any vocabulary: decodes new tokens together with those handed out just before them.

    Decoders look at neighbours (a leading space is dropped, byte tokens are joined), so the context
    always begins where text was handed out, never inside a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        self._pending.append(token)
        text = self._pending_text()
        incomplete = not text or text.endswith(REPLACEMENT)
        if incomplete and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._pending_text()) if self._pending else ""

    def _pending_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _emit(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text


class IdDetokenizer:
    """For checkpoints without a tokenizer: ids in decimal, with spaces between."""

    def __init__(self) -> None:
        self._separator = ""

    def add(self, token: int) -> str:
        text = f"{self._separator}{token}"
        self._separator = " "
        return text

    def flush(self) -> str:
        return ""


class StopFinder:
    """Finds the first stop string in text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is certainly before any stop string; sets `found` at a match."""
        if not self._stops or not text:
            return text
        text = self._held + text
        start = self._match(text)
        if start is not None:
            self.found, self._held = True, ""
            return text[:start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> int | None:
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(starts, default=None)

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
