"""Ranks for tests: spawned processes that share memory and run functions on demand.

Starting them imports torch, which takes seconds, so that a module's tests share one pool.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from nitsum.engine.launch import worker_context
from nitsum.messages import WorkerSpec
from nitsum.plan import all_groups
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import Shared, allocate

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=576,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=64,
    vocab_size=203,
    max_positions=256,
)
"""The hidden size of a 135M model; the rest as small as can be."""


def make_spec(num_ranks: int, **changes: Any) -> WorkerSpec:
    """Of rank 0: every group, four units a block."""
    fields: dict[str, Any] = {
        "rank": 0,
        "num_ranks": num_ranks,
        "model": "",
        "max_tp": 4,
        "groups": list(all_groups(num_ranks)),
        "block_tokens": 4,
        "num_units": 32,
        "max_slots": 8,
        "max_model_len": 64,
        "max_batch_tokens": 1024,
        "num_threads": 1,
        "engine_address": "",
        "inbox_address": "",
        "timeout_s": 20.0,
    }
    return WorkerSpec(**(fields | changes))


class Pool:
    """`num_ranks` processes; `run` calls a function in some of them at once."""

    def __init__(self, num_ranks: int) -> None:
        self.spec = make_spec(num_ranks)
        self.geometry = Geometry(SHAPE, self.spec.max_tp)
        self.shared = allocate(self.spec, self.geometry)
        self._connections: list[Connection] = []
        self._processes = []
        context = worker_context("cpu")
        for _ in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.shared), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """`function(shared, *args[rank])` in each rank named; a trace comes back as an error."""
        for rank, given in args.items():
            self._connections[rank].send((function, given))
        results = {rank: self._connections[rank].recv() for rank in args}
        for rank, (ok, value) in results.items():
            assert ok, f"rank {rank}: {value}"
        return {rank: value for rank, (_, value) in results.items()}

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()
            process.close()


def _serve(connection: Connection, shared: Shared) -> None:
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(shared, *args)))
        except Exception:
            connection.send((False, traceback.format_exc()))
