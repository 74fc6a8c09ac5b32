"""Resident memory of processes, from /proc."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nitsum.errors import NitsumError


def resident_bytes(pid: int) -> float:
    """Of a process and all its descendants; memory that several map counts once for each.

    Raises `NitsumError` where there is no /proc.
    """
    if not Path("/proc/self/status").exists():
        raise NitsumError("Memory of processes is read from /proc, which this system lacks.")
    children = _children()
    total, waiting = 0.0, [pid]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        total += _resident(process)
    return total


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parent = int(_field(folder, "PPid"))
                found.setdefault(parent, []).append(int(folder.name))
    return found


def _resident(pid: int) -> float:
    """0 for a process that is gone."""
    with suppress(OSError):
        return 1024.0 * int(_field(Path(f"/proc/{pid}"), "VmRSS").split()[0])
    return 0.0


def _field(folder: Path, name: str) -> str:
    """A line of /proc's `status`; 0 where it has none."""
    for line in (folder / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return "0"
