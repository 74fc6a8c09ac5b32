"""A real server in processes of its own: engine, workers, HTTP; and looks at its insides."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil

READY = re.compile(r"^Serving \S+ at (\S+)$")
START_S = 180.0


class RunningServer:
    """`nitsum serve` on a free port. Its log is in `lines`."""

    def __init__(self, checkpoint: Path, folder: Path, *flags: str) -> None:
        self.lines: list[str] = []
        # Short, because paths of sockets may not be long.
        self.temporary = Path(tempfile.mkdtemp(prefix="ns-", dir="/tmp"))
        command = [sys.executable, "-m", "nitsum.cli", "serve", str(checkpoint), "--port", "0"]
        # Nothing of one test reaches another, or the user's own files.
        own = {"XDG_DATA_HOME": str(folder), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--threads", "1", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **own},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait_url()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stdout.readline, ""))

    def _wait_url(self) -> str:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            for line in list(self.lines):
                if found := READY.match(line):
                    return found[1]
            time.sleep(0.05)
        self.process.kill()
        self.stop()
        raise AssertionError("the server did not start:\n" + "\n".join(self.lines))

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """End it as an administrator would; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        return self.process.wait()

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = _children(psutil.Process(self.process.pid), "multiprocessing.spawn")
        return engine

    def workers(self) -> list[psutil.Process]:
        """The workers' processes, in the order of their start, which is that of their ranks."""
        engine = self.engine()
        workers = _children(engine, "multiprocessing.spawn")  # where they are not forked
        for parent in _children(engine, "multiprocessing.forkserver"):
            workers += parent.children()
        return sorted(workers, key=lambda worker: worker.create_time())

    def state(self) -> dict[str, object]:
        return httpx.get(f"{self.url}/admin/state", timeout=30).raise_for_status().json()

    def wait_line(self, words: str, timeout_s: float = 60.0) -> str:
        """The first line of its log with these words."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for line in list(self.lines):
                if words in line:
                    return line
            time.sleep(0.05)
        raise AssertionError(f"no line says {words!r}:\n" + "\n".join(self.lines))


def _children(parent: psutil.Process, made_by: str) -> list[psutil.Process]:
    """Its children that this module started."""
    return [child for child in parent.children() if made_by in " ".join(child.cmdline())]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
