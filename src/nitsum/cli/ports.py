"""Whether an address can be listened on."""

from __future__ import annotations

import socket


def port_problem(host: str, port: int) -> str | None:
    """What is wrong with the address, and what to do; found by binding to it for a moment."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (
            f"--host, --port: cannot listen on {host}:{port} ({error.strerror}); choose others, or "
            "--port 0 for any free one."
        )
    return None
