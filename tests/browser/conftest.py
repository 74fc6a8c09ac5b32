"""A headless Chromium (Debian's chromium and chromium-driver), and a server to point it at."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.server.run import serve_async
from tests.server.server_kit import Bench, make_checkpoint

# Without the networking flags, Chromium looks up its maker's hosts at every start.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # A name that is not loopback, so that the server takes the page for a stranger's.
    "--host-resolver-rules=MAP stranger.test 127.0.0.1",
)
PLANS = ("2xTP1", "TP2", "TP2/2xTP1")
ANSWER = "the quick brown fox jumps over the lazy dog " * 3


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed; `make browser` installs it on Debian and Ubuntu."
        (pytest.fail if os.environ.get("NITSUM_NEED_BROWSER") else pytest.skip)(reason)
    return path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(_program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(plans=PLANS, delay_s=0.02)


@pytest.fixture
def url(tmp_path: Path, engine: FakeEngineClient) -> Iterator[str]:
    """A server in a thread of its own."""
    bench = Bench(make_checkpoint(tmp_path / "tiny"), engine, admin_key="secret").says(ANSWER)
    running = ServerThread(bench)
    running.start()
    try:
        yield running.url()
    finally:
        running.stop()


class ServerThread(threading.Thread):
    """Serves until told to stop."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(name="server")
        self._bench = bench
        self._ready = threading.Event()
        self._url = ""

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        settings = self._bench.app.state.service.settings
        serving = serve_async(settings, self._bench.engine, on_ready=self._on_ready)
        self._task = asyncio.create_task(serving)
        await asyncio.gather(self._task, return_exceptions=True)

    def _on_ready(self, url: str) -> None:
        self._url = url
        self._ready.set()

    def url(self) -> str:
        assert self._ready.wait(20), "the server did not start"
        return self._url

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self.join(20)
