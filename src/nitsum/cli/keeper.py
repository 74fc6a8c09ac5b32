"""Keeps an engine running: starts it, and starts it anew if its process ends on its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import wait

from nitsum.cli.progress import note
from nitsum.config import EngineConfig
from nitsum.engine.process import EngineProcess
from nitsum.errors import NitsumError
from nitsum.messages import EngineReady
from nitsum.shape import ModelShape


class EngineKeeper:
    """The server reconnects by itself to an engine started anew at the same address.

    Dead workers are the engine's own business; this is for the engine itself.
    """

    def __init__(
        self, config: EngineConfig, shape: ModelShape, address: str, give_up: Callable[[], None]
    ) -> None:
        """`give_up` is called, from another thread, when a new engine cannot start either."""
        self._start_args = (config, shape, address)
        self._give_up = give_up
        self._stopping = False
        self._engine: EngineProcess | None = None
        self._watcher = threading.Thread(target=self._watch, name="engine-keeper", daemon=True)

    def start(self) -> EngineReady:
        """Start the engine and wait for it. Raises `NitsumError` with what went wrong."""
        self._engine = EngineProcess(*self._start_args)
        ready = self._engine.wait_ready(note)
        self._watcher.start()
        return ready

    def stop(self) -> None:
        """End the engine, if there is one."""
        self._stopping = True
        if self._engine is not None:
            self._engine.stop()

    def _watch(self) -> None:
        while self._engine is not None:
            wait([self._engine.process.sentinel])
            if self._stopping:
                return
            note("The engine process ended. Starting it anew.")
            if not self._restart():
                return

    def _restart(self) -> bool:
        try:
            self._engine = EngineProcess(*self._start_args)
            self._engine.wait_ready(note)
        except (NitsumError, OSError) as error:
            if not self._stopping:
                note(f"The engine cannot be started again: {error}")
                self._give_up()
            return False
        note("The engine is back.")
        return True
