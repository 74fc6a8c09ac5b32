"""What a running server holds, to see that a time of trouble leaves nothing behind."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.fault.running import RunningServer

_SETTLE_S = 30.0
_SHARED = ("memfd:", "/dev/shm/")


@dataclass(frozen=True)
class Held:
    """Counts that must be the same before and after."""

    server_fds: list[str]
    engine_fds: list[str]
    worker_fds: list[str]
    """What their file descriptors are open on."""
    engine_shared_maps: int
    """Memory shared with workers that the engine has mapped."""
    temporary: int
    """What there is in its folder for temporary files: sockets of worker generations."""
    processes: int
    """The server's descendants and itself."""
    kv_used: float
    num_open: int


def held(server: RunningServer) -> Held:
    """Of a server at rest; waits until nothing is open any more."""
    _settle(server)
    me, engine = psutil.Process(server.process.pid), server.engine()
    state = server.state()
    return Held(
        server_fds=_open_on(me),
        engine_fds=_open_on(engine),
        worker_fds=[name for worker in server.workers() for name in _open_on(worker)],
        engine_shared_maps=_shared_maps(engine.pid),
        temporary=sum(1 for _ in server.temporary.iterdir()),
        processes=1 + len(me.children(recursive=True)),
        kv_used=max(rank["kv_used"] for rank in state["ranks"]),
        num_open=state["num_open"],
    )


def leaked(before: Held, after: Held) -> dict[str, object]:
    """What has grown, from and to; of descriptors, what is open more often than before."""
    found: dict[str, object] = {}
    for name, old in asdict(before).items():
        new = asdict(after)[name]
        if isinstance(old, list):
            more = Counter(new) - Counter(old)
            if len(new) > len(old):
                found[name] = dict(more)
        elif new > old:
            found[name] = (old, new)
    return found


def rss_mb(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


def _settle(server: RunningServer) -> None:
    """Connections that were cut need a moment until the server has noticed."""
    deadline_s = time.monotonic() + _SETTLE_S
    me, least = psutil.Process(server.process.pid), 10**9
    while time.monotonic() < deadline_s:
        time.sleep(0.5)
        fds = me.num_fds()
        if server.state()["num_open"] == 0 and fds >= least:
            return
        least = min(fds, least)


def _open_on(process: psutil.Process) -> list[str]:
    """Files by name, sockets by kind and state; the ledger's pool of connections left out."""
    names: list[str] = []
    sockets = {c.fd: f"{c.family.name} {c.status}" for c in process.net_connections("all")}
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            name = os.readlink(fd)
            if "ledger" not in name:
                names.append(sockets.get(int(fd.name), name.partition(":[")[0]))
    return sorted(names)


def _shared_maps(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return sum(any(kind in line for kind in _SHARED) for line in lines)
