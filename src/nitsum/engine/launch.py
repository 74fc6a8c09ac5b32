"""Starting one generation of workers: what each is told, what all share, one process a rank.

The entry point is a string that the child resolves, so this process never imports torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

from nitsum.config import EngineConfig
from nitsum.errors import ConfigError, WorkerDied, require_torch
from nitsum.messages import WorkerSpec
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import DTYPE_BYTES, SPAWN, Shared, allocate

ENTRY_POINT = "nitsum.worker.main:run"

WorkerProcess = SpawnProcess | ForkServerProcess


@dataclass(frozen=True)
class Generation:
    """Worker processes and what they share; the memory lives as long as anyone maps it."""

    specs: tuple[WorkerSpec, ...]
    shared: Shared
    processes: tuple[WorkerProcess, ...]


def launch(config: EngineConfig, shape: ModelShape, folder: Path) -> Generation:
    """Start a process for every rank; their sockets go into `folder`, which must be fresh.

    Raises `MissingDependency` without torch, `ConfigError` when the KV arena is too small,
    `WorkerDied` when a process could not be started.
    """
    require_torch()
    specs = worker_specs(config, shape, folder)
    shared = allocate(specs[0], _geometry(config, shape))
    return Generation(specs, shared, _start_all(specs, shared))


def worker_specs(config: EngineConfig, shape: ModelShape, folder: Path) -> tuple[WorkerSpec, ...]:
    """What each rank is told; equal but for the rank and its address."""
    return tuple(
        WorkerSpec(
            rank=rank,
            num_ranks=config.num_ranks,
            device=config.device,
            model=config.model,
            load_format=config.load_format,
            dtype=config.dtype,
            max_tp=config.max_tp,
            min_tp=config.min_tp,
            groups=list(config.plans.groups),
            block_tokens=config.block_tokens,
            num_units=num_units(config, shape),
            num_host_units=num_host_units(config, shape),
            max_slots=config.max_slots,
            max_model_len=max_model_len(config, shape),
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_share=config.gpu_memory_share,
            num_threads=num_threads(config),
            seed=config.seed,
            engine_address=f"ipc://{folder}/engine",
            inbox_address=f"ipc://{folder}/rank{rank}",
            timeout_s=config.timeout_s,
            fault=config.fault,
        )
        for rank in range(config.num_ranks)
    )


def max_model_len(config: EngineConfig, shape: ModelShape) -> int:
    """Longest prompt plus answer, tokens."""
    return config.max_model_len or shape.max_positions


def num_units(config: EngineConfig, shape: ModelShape) -> int:
    """Units of one rank's arena, a whole number of blocks at every degree; 0 leaves it to the
    worker (GPU only). Raises `ConfigError` when not even one block fits."""
    if not config.kv_bytes and config.device == "cuda":
        return 0
    geometry = _geometry(config, shape)
    unit_bytes = geometry.unit_bytes(config.block_tokens, DTYPE_BYTES[config.dtype])
    units = config.kv_bytes // unit_bytes // geometry.num_units * geometry.num_units
    if not units:
        raise ConfigError(
            f"kv_bytes is {config.kv_bytes:,}, but one block of {config.block_tokens} tokens "
            f"takes {unit_bytes * geometry.num_units:,}. Raise kv_bytes."
        )
    return units


def num_host_units(config: EngineConfig, shape: ModelShape) -> int:
    """Units of host memory per rank for KV that has to leave the arena."""
    geometry = _geometry(config, shape)
    return config.host_kv_bytes // geometry.unit_bytes(
        config.block_tokens, DTYPE_BYTES[config.dtype]
    )


def num_threads(config: EngineConfig) -> int:
    """CPU threads of one worker."""
    return config.num_threads or max(1, _num_cores() // config.num_ranks)


def _num_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _geometry(config: EngineConfig, shape: ModelShape) -> Geometry:
    return Geometry(shape, config.max_tp, config.min_tp)


def _start_all(specs: tuple[WorkerSpec, ...], shared: Shared) -> tuple[WorkerProcess, ...]:
    processes: list[WorkerProcess] = []
    try:
        for spec in specs:
            processes.append(_start(spec, shared))  # noqa: PERF401 - kept for the case of failure
    except BaseException as error:
        for process in processes:
            process.kill()
        if isinstance(error, (OSError, EOFError)):  # the process to fork from ended meanwhile
            raise WorkerDied(f"A worker could not be started: {error!r}") from error
        raise
    return tuple(processes)


def _start(spec: WorkerSpec, shared: Shared) -> WorkerProcess:
    process = worker_context(spec.device).Process(
        target=enter, args=(ENTRY_POINT, spec, shared), name=f"nitsum-rank{spec.rank}", daemon=True
    )
    process.start()
    return process


def worker_context(device: str) -> SpawnContext | ForkServerContext:
    """How ranks of `device` start: importing torch takes seconds, which CPU ranks share.

    They are forked from a process that has imported the worker and has neither the engine's
    sockets nor its threads; it stays for the next generation. A GPU rank sets its environment
    before it loads torch, and macOS's libraries do not survive a fork: those import it themselves.
    """
    if device != "cpu" or sys.platform != "linux":
        return SPAWN
    context = get_context("forkserver")
    context.set_forkserver_preload([ENTRY_POINT.partition(":")[0]])
    return context


def enter(entry_point: str, spec: WorkerSpec, shared: Shared) -> None:
    """In the child: resolve `module:function` and run it.

    OpenMP reads the number of threads once, when torch is first imported; where it already is, the
    worker's own call decides.
    """
    os.environ["OMP_NUM_THREADS"] = str(spec.num_threads)
    module, _, function = entry_point.partition(":")
    getattr(import_module(module), function)(spec, shared)
