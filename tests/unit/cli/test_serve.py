"""`nitsum serve` as a process: it answers, it brings a lost engine back, it ends when told to."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from nitsum.cli.memory_table import memory_table
from nitsum.cli.serve import curl_line, open_to_all, switch_line
from nitsum.server.settings import ServerSettings
from tests.shapes import TINY_LLAMA


def write_model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder


class Serving:
    """A server as a subprocess, whose output is gathered by a thread."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "nitsum.cli", "serve", *words, "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, found: Callable[[str], object], timeout_s: float = 120.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not found(self.output):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline_s, self.output
            time.sleep(0.05)

    @property
    def url(self) -> str:
        match = re.search(r"^Serving \S+ at (\S+)$", self.output, re.MULTILINE)
        assert match is not None, self.output
        return match[1]

    def wait(self) -> int:
        """Its exit status; all of its output has been read."""
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    flags = ("--load-format", "dummy", "--ranks", "2", "--kv-memory", "1MiB", "--threads", "1")
    with Serving(str(write_model(tmp_path)), *flags) as found:
        found.wait_for(lambda output: "curl" in output)
        yield found


def complete(url: str) -> httpx.Response:
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def engine_of(pid: int) -> int:
    """The child that runs the engine: the one that has children of its own."""
    children = _children(pid)
    return next(child for child in children if _children(child))


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    return [child for child, parent in pairs if parent == pid]


@pytest.mark.processes
def test_a_server_from_start_to_end(serving: Serving):
    assert complete(serving.url).json()["usage"]["completion_tokens"] == 4
    report = httpx.post(f"{serving.url}/admin/plans/switch", json={"plan": "TP2"}, timeout=60)
    assert report.json()["to_plan"] == "TP2"
    assert complete(serving.url).status_code == 200

    os.kill(engine_of(serving.process.pid), signal.SIGKILL)
    serving.wait_for(lambda output: "The engine is back." in output)
    serving.wait_for(lambda _: httpx.get(f"{serving.url}/health/ready").is_success)
    assert complete(serving.url).status_code == 200

    serving.process.send_signal(signal.SIGTERM)
    assert serving.wait() == 0, serving.output
    assert _children(serving.process.pid) == []


@pytest.mark.processes
def test_an_engine_that_cannot_start_says_why(tmp_path: Path):
    words = (str(write_model(tmp_path)), "--kv-memory", "1KiB", "--load-format", "dummy")
    with Serving(*words) as found:
        assert found.wait() == 1
    assert "kv_bytes is 1,024" in found.output
    assert "Traceback" not in found.output


def test_lines_to_paste(tmp_path: Path):
    settings = ServerSettings.from_checkpoint(
        write_model(tmp_path), model_names=("it's",), api_key="s3cret", admin_key="t0psecret"
    )
    shown = curl_line("http://h:1", settings) + switch_line("http://h:1", "TP2", settings)
    assert "s3cret" not in shown
    assert "t0psecret" not in shown
    printed = subprocess.run(
        ["bash", "-c", curl_line("http://h:1", settings).replace("curl", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        env={**os.environ, "NITSUM_API_KEY": "s3cret"},
    ).stdout.splitlines()
    assert "Authorization: Bearer s3cret" in printed
    assert json.loads(printed[-1])["model"] == "it's"


@pytest.mark.parametrize(
    ("host", "changes", "is_open"),
    [
        ("127.0.0.1", {}, False),
        ("::1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {}, True),
        ("10.0.0.7", {}, True),
        ("0.0.0.0", {"api_key": "s3cret"}, False),
        ("0.0.0.0", {"keys": Path("keys.json")}, False),
    ],
)
def test_a_server_that_is_open_to_all_says_so(host: str, changes: dict[str, Any], is_open: bool):
    settings = ServerSettings(
        checkpoint=Path(), model_names=("m",), max_model_len=8, vocab_size=8, host=host, **changes
    )
    warning = open_to_all(settings)
    assert bool(warning) == is_open
    assert not is_open or "--api-key" in warning


def test_memory_is_told_by_what_it_is_for():
    ranks = [
        {"weights": 1 << 30, "kv": 1 << 31, "host_kv": 0, "graphs": 1 << 29, "peak_rss": 1 << 40},
        {"weights": 1 << 30, "kv": 1 << 31, "host_kv": 0, "graphs": 3 << 28, "peak_rss": 1 << 41},
    ]
    lines = [line.split() for line in memory_table(ranks).splitlines()]
    assert [line[-1] for line in lines] == ["GiB:", "1.00", "2.00", "0.75", "3.75"]
    assert lines[3][-3:] == ["0.50", "to", "0.75"]
    assert "host" not in memory_table(ranks)
    assert memory_table(ranks[:1]).startswith("Memory of the rank, GiB:")
