"""A served demo model, and a proxy in front of it that fails first; for clients to cope with.

These tests run in an environment of their own (`make test-clients`), which has no Nitsum in it:
the server is started with the interpreter named by `--server-python`.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

REPOSITORY = Path(__file__).parents[2]
READY = re.compile(r"^Serving (\S+) at (\S+)$")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server-python", help="an interpreter that has Nitsum")
    parser.addoption("--server-url", help="use this server instead of starting one")


class Served:
    """Where the model is, and its name."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.api = f"{url}/v1"
        self.model = model

    def num_served(self, tier: str) -> float:
        """Requests that asked for a tier and got it, for clients that do not show their tier."""
        import httpx

        line = (
            f'nitsum:requests_total{{outcome="ok",tier_requested="{tier}",tier_served="{tier}"}} '
        )
        found = httpx.get(f"{self.url}/metrics").text.partition(line)[2]
        return float(found.split("\n")[0] or 0)


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    given = request.config.getoption("--server-url")
    if given:
        yield Served(given, _model(given))
        return
    python = request.config.getoption("--server-python")
    if not python:
        pytest.exit("Give --server-python, or run `make test-clients`.", returncode=2)
    yield from _started(python, tmp_path_factory.mktemp("data"))


def _model(url: str) -> str:
    import httpx

    return httpx.get(f"{url}/v1/models").json()["data"][0]["id"]


def _checkpoint(python: str, folder: Path) -> Path:
    """The demo model with a chat template that has a place for tools; its own has none."""
    find = "from nitsum.cli.checkpoint import checkpoint_folder as f; print(f('demo'))"
    done = subprocess.run([python, "-c", find], stdout=subprocess.PIPE, text=True, check=True)
    copy = folder / "smollm2-with-tools"
    copy.mkdir()
    for file in Path(done.stdout.split("\n")[-2]).iterdir():
        (copy / file.name).symlink_to(file)
    template = copy / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.write_text((Path(__file__).parent / "tools_template.jinja").read_text())
    return copy


def _started(python: str, folder: Path) -> Iterator[Served]:
    model = str(_checkpoint(python, folder))
    command = [python, "-m", "nitsum.cli", "serve", model, "--ranks", "2", "--port", "0"]
    yield from _running([*command, "--data-dir", str(folder), "--log-level", "warning"])


def _running(command: list[str]) -> Iterator[Served]:
    """A server as long as the test needs it; it prints where it is."""
    surroundings = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=surroundings, cwd=REPOSITORY
    )
    assert process.stdout is not None
    found = next((m for m in map(READY.match, process.stdout) if m), None)
    assert found, "the server did not start"
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    reader.start()
    try:
        yield Served(found[2], found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        reader.join(10)
        process.stdout.close()


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> Iterator[Served]:
    """The real HTTP server over an engine that answers at once."""
    python = request.config.getoption("--server-python")
    if not python:
        pytest.skip("needs --server-python")
    yield from _running([python, "-m", "tests.clients.fake_server"])


class Flaky(ThreadingHTTPServer):
    """Refuses the first calls as an overloaded server does, and passes on the rest."""

    daemon_threads = True

    def __init__(self, upstream: str, num_refused: int) -> None:
        super().__init__(("127.0.0.1", 0), _FlakyHandler)
        self.upstream = urlsplit(upstream).netloc
        self.num_left = num_refused
        self.num_calls = 0

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


REFUSAL = (
    b'{"error": {"message": "No capacity for flex now.", "type": "rate_limit_error",'
    b' "param": null, "code": "resource_unavailable"}}'
)


class _FlakyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.num_calls += 1
        if self.server.num_left:
            self.server.num_left -= 1
            self._send(429, REFUSAL, {"retry-after-ms": "50", "retry-after": "1"})
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=120)
        upstream.request("POST", self.path, body, {"content-type": "application/json"})
        answer = upstream.getresponse()
        self._send(answer.status, answer.read(), {})
        upstream.close()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def flaky(served: Served) -> Iterator[Flaky]:
    with Flaky(served.url, num_refused=2) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()
