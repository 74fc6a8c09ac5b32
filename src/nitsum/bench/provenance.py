"""Where a number comes from: command, versions, hardware, date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nitsum import __version__

_PACKAGES = ("torch", "transformers")


def summary(figures: dict[str, float], notes: str = "") -> dict[str, Any]:
    """A run's result, as files of published results hold it."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["nitsum", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(),
        "notes": notes,
        "figures": figures,
    }


def versions() -> dict[str, str]:
    found = {"nitsum": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The GPUs, the processor and how many cores this process may use."""
    return "; ".join([*_gpus(), f"{_processor()}, {num_cores()} cores"])


def _gpus() -> list[str]:
    """As `2x NVIDIA H100 80GB HBM3`, one entry a kind; none where no driver answers."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"{num}x {name}" for name, num in Counter(found.stdout.splitlines()).items()]


def num_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
