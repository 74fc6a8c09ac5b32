"""Runs the application under uvicorn, with an end that loses no request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from nitsum.engine.client import EngineClient
from nitsum.garbage import set_aside
from nitsum.server.app import build_app
from nitsum.server.patience import patient_protocol
from nitsum.server.service import Service
from nitsum.server.settings import ServerSettings

OnReady = Callable[[str], None]

log = logging.getLogger("nitsum.server.run")

_POLL_S = 0.05
# For connections that are idle or whose client does not read: all requests have ended before.
_CLOSE_S = 2


def serve(
    settings: ServerSettings, client: EngineClient, *, on_ready: OnReady | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` gets the URL once the port is open.

    The first signal drains: new requests get a 503, those that are here finish (for `drain_s` at
    most, then they end in an error). The second stops at once.
    """

    def ready(url: str) -> None:
        set_aside()  # to look at it again would take milliseconds
        if on_ready is not None:
            on_ready(url)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve_async(settings, client, on_ready=ready))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The fastest event loop that is installed; None for asyncio's own."""
    try:
        import uvloop  # pyright: ignore[reportMissingImports]
    except ImportError:  # there is none for Windows
        return None
    return uvloop.new_event_loop


async def serve_async(
    settings: ServerSettings, client: EngineClient, *, on_ready: OnReady | None = None
) -> None:
    """`serve`, inside a running loop. Cancelling it stops at once, and closes what is open."""
    app = build_app(client, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=patient_protocol(settings.patience_s),
        log_config=None,
        access_log=False,
        ws="none",
        lifespan="on",
        # Whether a caller is local decides who is an admin, so no header may say it.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=_CLOSE_S,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    server = DrainingServer(config, app.state.service, on_ready, on_end=app.state.sampler.stop)
    running = asyncio.create_task(server.serve())
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        server.should_exit = True
        await running
        raise


class DrainingServer(uvicorn.Server):
    """Uvicorn's server, which on the first signal goes on until its requests are done."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        on_ready: OnReady | None = None,
        *,
        on_end: Callable[[], None],
    ) -> None:
        """`on_end` ends the streams that would never end by themselves."""
        super().__init__(config)
        self._on_end = on_end
        self._service = service
        self._on_ready = on_ready
        self._drain: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._reload_on_hangup()
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready(self._url())

    def _reload_on_hangup(self) -> None:
        """SIGHUP reads the key file again, at once. (A changed file is noticed without it, too.)"""
        keys = self._service.keys
        if keys is not None and threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, keys.reload)

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between any two instructions."""
        if self._signalled or not self.started:
            self.should_exit = True
            return
        self._signalled = self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.create_task(self._drain_and_exit(), name="drain")

    async def _drain_and_exit(self) -> None:
        service = self._service
        log.info(
            "Shutting down: %d request(s) have %g s to finish. A second signal ends them now.",
            len(service.metrics.open),
            service.settings.drain_s,
        )
        await service.engine.drain()
        deadline_s = self._loop.time() + service.settings.drain_s
        while service.metrics.open and self._loop.time() < deadline_s and not self.should_exit:
            await asyncio.sleep(_POLL_S)
        if service.metrics.open:
            log.warning("%d request(s) end unfinished.", len(service.metrics.open))
        self._on_end()
        # Ends what is still open in an error that its client sees.
        await service.engine.close()
        await asyncio.sleep(_POLL_S)
        self.should_exit = True
