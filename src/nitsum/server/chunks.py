"""The chunks of one stream as bytes. Most only add text, so they are one form with blanks.

data: {"id":"cmpl-1", ... "text":[     ],"finish_reason":null, ... "usage":[     ], ... }
      |---------- head ----------|     |----------- middle ----------|     |--- tail ---|
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from nitsum.server.answer import Piece
from nitsum.server.job import Job
from nitsum.server.shapes import Blank, Usage
from nitsum.server.sse import event

ChunkUsage = Usage | UnsetType | None

# JSON text never holds a NUL, so an encoded form can be cut at its blanks.
_CUT = b"\0"
BLANK = Blank(_CUT)

_encode = msgspec.json.Encoder().encode


class ChunkShape(Protocol):
    """How one endpoint writes its chunks."""

    def chunks(self, job: Job, piece: Piece, usage: ChunkUsage) -> Iterator[msgspec.Struct]:
        """Chunks for a piece; none while all of it is held back."""
        ...

    def form(self, job: Job, index: int, usage: Blank | ChunkUsage) -> msgspec.Struct | None:
        """The chunk of a plain piece (`Piece.is_plain`) of choice `index`, its text left `BLANK`.

        None while the next chunk of this choice says more than that.
        """
        ...


class ChunkWriter:
    """Chunks of one stream; `running` puts the usage so far into each."""

    def __init__(self, job: Job, shape: ChunkShape, *, with_usage: bool, running: bool) -> None:
        self._job = job
        self._shape = shape
        self._with_usage = with_usage
        self._running = running
        self._forms: dict[tuple[int, str], list[bytes]] = {}
        """By choice and the tier it is served as: what stands around the blanks."""

    def write(self, piece: Piece) -> bytes:
        """All events of a piece; empty while it is held back."""
        form = self._form(piece.index) if piece.is_plain else None
        if form is None:
            usage = self._job.usage() if self._running else None if self._with_usage else UNSET
            return b"".join(map(event, self._shape.chunks(self._job, piece, usage)))
        if self._running:
            head, middle, tail = form
            return b"".join((head, _encode(piece.text), middle, _encode(self._job.usage()), tail))
        head, tail = form
        return b"".join((head, _encode(piece.text), tail))

    def _form(self, index: int) -> list[bytes] | None:
        key = (index, self._job.answers[index].tier)
        form = self._forms.get(key)
        if form is None:
            usage = BLANK if self._running else None if self._with_usage else UNSET
            chunk = self._shape.form(self._job, index, usage)
            if chunk is None:
                return None
            form = self._forms[key] = event(chunk).split(_CUT)
        return form
