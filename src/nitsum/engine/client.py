"""How the server talks to the engine: a protocol, and the real client over ZeroMQ."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol, TypeVar, cast

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from nitsum.errors import ApiError
from nitsum.messages import (
    Abort,
    Drain,
    FromEngine,
    GetStatus,
    Output,
    Status,
    Submit,
    SwitchPlan,
    SwitchReport,
    ToEngine,
    Tokens,
    encode,
    from_engine_decoder,
)
from nitsum.request import Request

SwitchListener = Callable[[SwitchReport], None]
ReplyT = TypeVar("ReplyT", Status, SwitchReport)

_GONE = "The engine is not running; it is started again or needs a look at its log. Try again soon."
_CONNECTED = zmq.Event.HANDSHAKE_SUCCEEDED
_DISCONNECTED = zmq.Event.DISCONNECTED
_RETRY_AFTER_S = 5.0


class EngineClient(Protocol):
    """All the server asks of an engine. Every method belongs to one event loop."""

    async def start(self) -> None:
        """Open what needs a running loop; returns without waiting for the engine."""
        ...

    async def close(self) -> None: ...

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs of one request, in order; the last has a `finish_reason` or an `error`.

        Closing the generator earlier aborts the request.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Free all the request holds; it gets no further output. Unknown ids are fine."""
        ...

    async def switch(self, op_id: str, plan: str) -> SwitchReport:
        """Go to `plan`; returns when the switch has ended, `ok` or not.

        Raises `ApiError` (409) when `op_id` is that of a switch to another plan.
        """
        ...

    async def drain(self) -> None:
        """Accept no more; finish what is here."""
        ...

    async def status(self, num_decisions: int = 0) -> Status:
        """A snapshot, with the controller's last decisions if asked for.

        Raises `ApiError` (503) when the engine does not answer.
        """
        ...

    def on_switch(self, listener: SwitchListener) -> None:
        """Call `listener` for each switch that ends, whoever asked for it."""
        ...


def engine_gone() -> ApiError:
    """The 503 of a server without an engine."""
    return ApiError(
        _GONE,
        status=503,
        type="server_error",
        code="server_is_overloaded",
        retry_after_s=_RETRY_AFTER_S,
    )


def op_id_in_use(op_id: str, its_plan: str, plan: str) -> ApiError:
    """The 409 of an operation that is asked for again with another plan."""
    return ApiError(
        f"Operation {op_id!r} is a switch to {its_plan}. Use an op_id of its own for {plan}.",
        status=409,
        param="op_id",
        code="op_id_in_use",
    )


def gone_output(request_id: str) -> Output:
    """The end of a request whose engine died."""
    return Output(request_id, error=_GONE, error_status=503, error_code="server_is_overloaded")


class Inbox:
    """Outputs of one request that nobody has read yet. One reader; tokens wait side by side.

    A reader that is behind finds several tokens in one output, so what waits stays small.
    """

    def __init__(self) -> None:
        self._unread: deque[Output] = deque()
        self._last: Output | None = None
        """The last output, read or not."""
        self._grows = False
        """The last unread output is ours, and more tokens fit in."""
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self._last = output
        self._grows = False
        self._unread.append(output)
        self._wake()

    def put_token(self, token: int) -> None:
        """A token of which all else is as the last output had it; without one, nobody knows it."""
        if self._grows:
            self._unread[-1].tokens.append(token)
        elif self._last is not None:
            self._unread.append(msgspec.structs.replace(self._last, tokens=[token], **_BARE))
            self._grows = True
            self._wake()

    @property
    def has_unread(self) -> bool:
        return bool(self._unread)

    async def get(self) -> Output:
        """The next output, as soon as there is one."""
        while not self._unread:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._grows = self._grows and len(self._unread) > 1
        return self._unread.popleft()

    def _wake(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)


_BARE: dict[str, Any] = {"logprobs": [], "logits": []}


class ZmqEngineClient:
    """The client of an engine in another process.

    When the connection breaks (the engine's process ended), every open request ends in an error.
    The socket reconnects by itself, so an engine started anew at the same address is used again.
    """

    def __init__(
        self, address: str, *, status_timeout_s: float = 5.0, switch_timeout_s: float = 300.0
    ) -> None:
        self._address = address
        self._status_timeout_s = status_timeout_s
        self._switch_timeout_s = switch_timeout_s
        self._inboxes: dict[str, Inbox] = {}
        self._statuses: dict[str, asyncio.Future[Status]] = {}
        self._switches: dict[str, asyncio.Future[SwitchReport]] = {}
        self._targets: dict[str, str] = {}
        """By operation, the plans of switches that are waited for."""
        self._listeners: list[SwitchListener] = []
        self._connected = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    async def wait_connected(self) -> None:
        """Return once an engine is at the other end."""
        await self._connected.wait()

    async def start(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._monitor = self._socket.get_monitor_socket(_CONNECTED | _DISCONNECTED)
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-receive"),
            asyncio.create_task(self._watch(), name="engine-watch"),
        ]
        self._socket.connect(self._address)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lose_engine()
        if self._tasks:
            self._socket.disable_monitor()
            self._context.destroy(linger=0)
        self._tasks = []

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        inbox = self._inboxes[request.request_id] = Inbox()
        ended = False
        try:
            if not self._post(Submit(request)):
                inbox.put(gone_output(request.request_id))
            while not ended:
                output = await inbox.get()
                ended = output.finish_reason is not None or output.error is not None
                yield output
        finally:
            del self._inboxes[request.request_id]
            if not ended:
                self._post(Abort(request.request_id))

    async def abort(self, request_id: str) -> None:
        self._post(Abort(request_id))

    async def switch(self, op_id: str, plan: str) -> SwitchReport:
        self._targets = {op: its for op, its in self._targets.items() if op in self._switches}
        its_plan = self._targets.setdefault(op_id, plan)
        if its_plan != plan:
            raise op_id_in_use(op_id, its_plan, plan)
        message = SwitchPlan(op_id, plan)
        return await self._ask(self._switches, op_id, message, self._switch_timeout_s)

    async def drain(self) -> None:
        self._post(Drain())

    async def status(self, num_decisions: int = 0) -> Status:
        op_id = uuid.uuid4().hex
        message = GetStatus(op_id, num_decisions)
        return await self._ask(self._statuses, op_id, message, self._status_timeout_s)

    def on_switch(self, listener: SwitchListener) -> None:
        self._listeners.append(listener)

    def _post(self, message: ToEngine) -> bool:
        """Hand a message to the socket; False when there is no engine to take it."""
        if not self.connected:
            return False
        sent = cast("asyncio.Future[object]", self._socket.send(encode(message), zmq.NOBLOCK))
        return sent.exception() is None

    async def _ask(
        self,
        waiting: dict[str, asyncio.Future[ReplyT]],
        op_id: str,
        message: ToEngine,
        timeout_s: float,
    ) -> ReplyT:
        """Send, and wait for the reply with this id; callers with one id share the reply."""
        reply = waiting.get(op_id)
        if reply is None:
            reply = waiting[op_id] = asyncio.get_running_loop().create_future()
            reply.add_done_callback(lambda done: _forget(waiting, op_id, done))
            if not self._post(message):
                reply.set_exception(engine_gone())
        try:
            return await asyncio.wait_for(asyncio.shield(reply), timeout_s)
        except TimeoutError:
            waiting.pop(op_id, None)
            raise _no_answer(timeout_s) from None

    async def _receive(self) -> None:
        while True:
            for frame in await self._socket.recv_multipart():
                self._deliver(from_engine_decoder.decode(frame))

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, Tokens):
            for request_id, token in zip(message.request_ids, message.tokens, strict=True):
                self._deliver_token(request_id, token)
        elif isinstance(message, Output):
            self._deliver_output(message)
        elif isinstance(message, Status):
            _resolve(self._statuses.get(message.op_id), message)
        else:
            _resolve(self._switches.get(message.op_id), message)
            for listener in self._listeners:
                listener(message)

    def _deliver_output(self, output: Output) -> None:
        inbox = self._inboxes.get(output.request_id)
        if inbox is not None:
            inbox.put(output)
        elif output.finish_reason is None and output.error is None:
            # Nobody reads it: aborted a moment ago, or submitted by a server or to an engine that
            # has died since.
            self._post(Abort(output.request_id))

    def _deliver_token(self, request_id: str, token: int) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put_token(token)
        else:
            self._post(Abort(request_id))

    async def _watch(self) -> None:
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == _CONNECTED:
                self._connected.set()
            else:
                self._drain_socket()
                self._lose_engine()

    def _drain_socket(self) -> None:
        """Deliver what the engine sent before it died."""
        while True:
            now = self._socket.recv_multipart(zmq.NOBLOCK)
            received = cast("asyncio.Future[list[bytes]]", now)
            if received.exception() is not None:
                return
            for frame in received.result():
                self._deliver(from_engine_decoder.decode(frame))

    def _lose_engine(self) -> None:
        self._connected.clear()
        for request_id, inbox in self._inboxes.items():
            inbox.put(gone_output(request_id))
        for reply in [*self._statuses.values(), *self._switches.values()]:
            if not reply.done():
                reply.set_exception(engine_gone())


def _forget(
    waiting: dict[str, asyncio.Future[ReplyT]], op_id: str, reply: asyncio.Future[ReplyT]
) -> None:
    waiting.pop(op_id, None)
    # Looked at, so that asyncio does not complain when every waiter has gone.
    if not reply.cancelled():
        reply.exception()


def _resolve(reply: asyncio.Future[ReplyT] | None, message: ReplyT) -> None:
    if reply is not None and not reply.done():
        reply.set_result(message)


def _no_answer(timeout_s: float) -> ApiError:
    return ApiError(
        f"The engine has not answered within {timeout_s:g} s. If it stays so, look at its log.",
        status=503,
        type="server_error",
        code="server_is_overloaded",
        retry_after_s=_RETRY_AFTER_S,
    )
