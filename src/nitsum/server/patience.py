"""Connections whose client stops in the middle of something do not stay open for ever.

waits for the client       a request's head, the rest of its body, room for more of the answer
waits for us               an answer under way, however long it takes
waits for nobody           an open connection without a request: uvicorn's keep-alive ends it
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class _Uvicorn(AutoHTTPProtocol):  # pyright: ignore[reportGeneralTypeIssues]
    """What both of uvicorn's protocols have, said to the type checker."""

    transport: Any
    cycle: Any
    flow: Any


def patient_protocol(patience_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, cutting off clients that send and read nothing for `patience_s`."""

    class PatientProtocol(_Uvicorn):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._wait(True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait(self._is_incomplete())

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(True)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._wait(False)

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait(False)
            super().connection_lost(exc)

        def _is_incomplete(self) -> bool:
            """Part of a head is here, or part of a body."""
            cycle = self.cycle
            return cycle is None or cycle.response_complete or cycle.more_body

        def _wait(self, waits: bool) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if waits:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(patience_s, self._cut_off)

        def _cut_off(self) -> None:
            if self.flow.read_paused:  # what it sent has not been looked at yet
                self._wait(True)
            else:
                self.transport.abort()

    return PatientProtocol
