"""The engine's end of the connection to the server: one ZeroMQ socket, messages both ways.

The engine binds; the server connects, and reconnects by itself. A message on the wire has one or
more frames, each one msgpack-encoded struct of `nitsum.messages`.
"""

from __future__ import annotations

from collections.abc import Iterable

import zmq

from nitsum.messages import (
    Abort,
    FromEngine,
    Output,
    ToEngine,
    Tokens,
    encode,
    to_engine_decoder,
)

Facts = tuple[str, str | None, str, str, int, float, int]


class ServerLink:
    """Non-blocking; made for a single-threaded loop that also polls other sockets."""

    def __init__(self, address: str) -> None:
        """Bind `address`, such as `ipc:///run/nitsum/engine.sock`."""
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self.socket = self._context.socket(zmq.DEALER)
        """To register with a `zmq.Poller` (POLLIN); read only through `receive`."""
        self.socket.sndhwm = self.socket.rcvhwm = 0
        self.socket.bind(address)
        self._columns = Columns()

    def receive(self, most: int) -> list[ToEngine]:
        """The messages that are here, in order, about `most` of them; never waits."""
        messages: list[ToEngine] = []
        while len(messages) < most:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            for frame in frames:
                message = to_engine_decoder.decode(frame)
                if isinstance(message, Abort):
                    self._columns.forget(message.request_id)
                messages.append(message)
        return messages

    def send(self, *messages: FromEngine) -> bool:
        """Send messages in one go; False when no server is connected and they were dropped.

        Give all outputs of a step to one call: the server wakes up once for them, and what they
        have in common is said once.
        """
        if not messages:
            return True
        frames = [encode(message) for message in self._columns.gather(messages)]
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Deliver what is sent (waiting a second at most) and close; safe to call twice."""
        self._context.destroy(linger=1000)


class Columns:
    """Turns outputs that say nothing but a token into one message for all of them."""

    def __init__(self) -> None:
        self._told: dict[str, Facts] = {}
        """What the server knows of each open request."""

    def gather(self, messages: Iterable[FromEngine]) -> list[FromEngine]:
        """The same news in fewer messages, each request's in the order they came in."""
        found: list[FromEngine] = []
        last: Tokens | None = None
        for message in messages:
            if isinstance(message, Output) and self._is_plain(message):
                if last is None:
                    last = Tokens([], [])
                    found.append(last)
                last.request_ids.append(message.request_id)
                last.tokens.append(message.tokens[0])
            else:
                last = None
                found.append(message)
        return found

    def forget(self, request_id: str) -> None:
        """A request has ended without a last output."""
        self._told.pop(request_id, None)

    def _is_plain(self, output: Output) -> bool:
        """It is one token, and all else is as the server knows it (from now on)."""
        request_id = output.request_id
        if output.finish_reason is not None or output.error is not None:
            self.forget(request_id)
            return False
        facts = (
            output.tier,
            output.reason,
            output.plan,
            output.lane,
            output.num_cached,
            output.queue_s,
            output.num_displaced,
        )
        if self._told.get(request_id) != facts:
            self._told[request_id] = facts
            return False
        return len(output.tokens) == 1 and not output.logprobs and not output.logits
