"""The folder for what outlives a server: uploaded files, batches, their results.

server.lock            held by the one server that uses the folder
files/ID.json          what the API tells of a file; written last, so a file is there or not
files/ID.data          its bytes
batches/ID.json        a batch and how far it is
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, TypeVar

import msgspec

StructT = TypeVar("StructT", bound=msgspec.Struct)


class DataFolder:
    """Owns the folder between `open` and `close`. Names come from ids this server has made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def open(self) -> bool:
        """Take the folder; False when another server has it. Raises `OSError`."""
        for name in ("files", "batches"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        lock = (self.path / "server.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        return True

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def data_path(self, file_id: str) -> Path:
        return self.path / "files" / f"{file_id}.data"

    def save(self, kind: str, name: str, value: msgspec.Struct) -> None:
        """Write `kind/name.json`, whole or not at all."""
        path = self._json(kind, name)
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(value))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def load_all(self, kind: str, struct: type[StructT]) -> list[StructT]:
        paths = sorted((self.path / kind).glob("*.json"))
        return [msgspec.json.decode(path.read_bytes(), type=struct) for path in paths]

    def remove_file(self, file_id: str) -> None:
        self._json("files", file_id).unlink(missing_ok=True)
        self.data_path(file_id).unlink(missing_ok=True)

    def _json(self, kind: str, name: str) -> Path:
        return self.path / kind / f"{name}.json"


def read_whole_lines(path: Path) -> list[bytes]:
    """Lines of a file that was appended to; an end that was cut off in the middle is cut away."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()
