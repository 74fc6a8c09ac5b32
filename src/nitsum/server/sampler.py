"""Looks at the engine once a second, keeps a history, and wakes whoever watches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator

import msgspec

from nitsum.errors import ApiError
from nitsum.messages import Status
from nitsum.server.caller import now_s
from nitsum.server.service import Service
from nitsum.server.state import Sample, State, sample_of, state_of

PERIOD_S = 1.0
MAX_SAMPLES = 600

log = logging.getLogger("nitsum.engine")


class Sampler:
    """One look a second, however many watch."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._history: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._looked = asyncio.Event()
        """Set at each look, and then replaced."""
        self._state: State | None = None
        self._num_tokens = 0
        self._num_restarts = 0
        self._looked_s = now_s()
        self._stopped = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    def stop(self) -> None:
        """End everybody's stream."""
        self._stopped = True
        self._looked.set()

    async def look(self) -> State:
        """A fresh state, which also becomes part of the history."""
        status = await self._status()
        state = state_of(self._service, status, self._tokens_per_s(status))
        if state.engine_up or self._history:  # nothing to draw before the first answer
            self._history.append(sample_of(state))
        self._note_restarts(status)
        self._state = state
        self._looked.set()
        if not self._stopped:
            self._looked = asyncio.Event()
        return state

    async def snapshot(self) -> State:
        """The state now, with the history."""
        status = await self._status()
        rate = self._state.tokens_per_s if self._state else 0.0
        state = state_of(self._service, status, rate)
        return msgspec.structs.replace(state, history=list(self._history))

    async def states(self) -> AsyncGenerator[State, None]:
        """The state now, with the history, and each one that follows, without."""
        yield await self.snapshot()
        while not self._stopped:
            await self._looked.wait()
            if self._state is not None and not self._stopped:
                yield self._state

    async def _status(self) -> Status | None:
        try:
            return await self._service.engine.status(1)
        except ApiError:
            return None

    def _tokens_per_s(self, status: Status | None) -> float:
        """Since the last look."""
        if status is None or status.tally is None:
            return 0.0
        count, at_s = status.tally.num_output_tokens, now_s()
        rate = max(0, count - self._num_tokens) / max(at_s - self._looked_s, 1e-3)
        self._num_tokens, self._looked_s = count, at_s
        return rate

    def _note_restarts(self, status: Status | None) -> None:
        """A line for each restart since the last look."""
        if status is None or status.tally is None:
            return
        num_new = status.tally.num_restarts - self._num_restarts
        for restart in status.tally.last_restarts[-num_new:] if num_new > 0 else ():
            log.warning(restart.words, extra={"restart_s": round(restart.restart_s, 3)})
        self._num_restarts = status.tally.num_restarts
