"""The engine's end of the connection to the server: one ZeroMQ socket, messages both ways.

The engine binds; the server connects, and reconnects by itself. A message on the wire has one or
more frames, each one msgpack-encoded struct of `nitsum.messages`.
"""

from __future__ import annotations

import zmq

from nitsum.messages import FromEngine, ToEngine, encode, to_engine_decoder


class ServerLink:
    """Non-blocking; made for a single-threaded loop that also polls other sockets."""

    def __init__(self, address: str) -> None:
        """Bind `address`, such as `ipc:///run/nitsum/engine.sock`."""
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self.socket = self._context.socket(zmq.DEALER)
        """To register with a `zmq.Poller` (POLLIN); read only through `receive`."""
        self.socket.sndhwm = self.socket.rcvhwm = 0
        self.socket.bind(address)

    def receive(self, most: int) -> list[ToEngine]:
        """The messages that are here, in order, about `most` of them; never waits."""
        messages: list[ToEngine] = []
        while len(messages) < most:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.extend(map(to_engine_decoder.decode, frames))
        return messages

    def send(self, *messages: FromEngine) -> bool:
        """Send messages in one go; False when no server is connected and they were dropped.

        Give all outputs of a step to one call: the server wakes up once for them.
        """
        if not messages:
            return True
        frames = [encode(message) for message in messages]
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Deliver what is sent (waiting a second at most) and close; safe to call twice."""
        self._context.destroy(linger=1000)
