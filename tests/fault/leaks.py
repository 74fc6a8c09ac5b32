"""What a running server holds, to see that a time of trouble leaves nothing behind."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.fault.running import RunningServer

_SETTLE_S = 30.0
_SHARED = ("memfd:", "/dev/shm/")


@dataclass(frozen=True)
class Held:
    """Counts that must be the same before and after."""

    server_fds: int
    engine_fds: int
    worker_fds: int
    engine_shared_maps: int
    """Memory shared with workers that the engine has mapped."""
    shared_files: int
    """Files in /dev/shm."""
    folders: int
    """Temporary folders of worker generations."""
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
        server_fds=me.num_fds(),
        engine_fds=engine.num_fds(),
        worker_fds=sum(worker.num_fds() for worker in server.workers()),
        engine_shared_maps=_shared_maps(engine.pid),
        shared_files=_count(Path("/dev/shm")),
        folders=sum(1 for _ in Path("/tmp").glob("nitsum-*/engine")),
        processes=1 + len(me.children(recursive=True)),
        kv_used=max(rank["kv_used"] for rank in state["ranks"]),
        num_open=state["num_open"],
    )


def leaked(before: Held, after: Held) -> dict[str, tuple[float, float]]:
    """What has grown, from and to."""
    pairs = {name: (value, asdict(after)[name]) for name, value in asdict(before).items()}
    return {name: (old, new) for name, (old, new) in pairs.items() if new > old}


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


def _shared_maps(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return sum(any(kind in line for kind in _SHARED) for line in lines)


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
