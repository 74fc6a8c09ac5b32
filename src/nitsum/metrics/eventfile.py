"""Event streams on disk: one JSON object a line, gzip when the name ends in `.gz`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import msgspec

from nitsum.errors import ConfigError
from nitsum.events import AnyEvent

_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def _opened(path: Path, mode: str) -> IO[bytes]:
    try:
        # The caller closes it.
        file = gzip.open(path, mode) if path.suffix == ".gz" else path.open(mode)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"Cannot open events {path}: {error.strerror}.") from error
    return cast("IO[bytes]", file)


class EventFile:
    """An `EventSink` that appends to a file as events happen; close it to have all of them."""

    def __init__(self, path: Path) -> None:
        self._file = _opened(path, "wb")

    def emit(self, event: AnyEvent) -> None:
        self._file.write(_encode(event) + b"\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_events(path: Path, events: Iterable[AnyEvent]) -> None:
    with EventFile(path) as file:
        for event in events:
            file.emit(event)


def read_events(path: Path, *, is_growing: bool = False) -> Iterator[AnyEvent]:
    """The events of a file, one at a time; raises `ConfigError` naming a bad line.

    The last line of a file that `is_growing` may not be whole yet, and is left out then.
    """
    with _opened(path, "rb") as file:
        for number, line in enumerate(_lines(file, path, is_growing), start=1):
            if is_growing and not line.endswith(b"\n"):
                return
            try:
                yield _decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error}.") from error


def _lines(file: IO[bytes], path: Path, is_growing: bool) -> Iterator[bytes]:
    try:
        yield from file
    except EOFError:
        if not is_growing:
            raise ConfigError(
                f"Events {path} ends in the middle: whoever wrote it was broken off, or still "
                f"writes. Unpack what is there (`gzip -dc`) to read that."
            ) from None
    except (OSError, zlib.error) as error:
        raise ConfigError(f"Cannot read events {path}: {error}.") from error
