"""Memory and barriers that the processes of one worker generation share. Torch-free.

Nothing here has a name that two generations could both want: regions are anonymous files handed
to new processes as descriptors, semaphores are the anonymous ones of `multiprocessing`.

    Shared
      arenas[rank]     K and V of a rank                       written by it, read by its peers
      hosts[rank]      units that had to leave an arena        written by it, read by its peers
      rows[rank]       int32 [max_slots, row_tokens]           written by it, read by its peers
      progress         int64 [num_ranks]                       each rank writes its own count
      groups[i]        barrier and buffer of WorkerSpec.groups[i]
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Semaphore
from typing import Any, NamedTuple

from nitsum.errors import WorkerDied
from nitsum.messages import WorkerSpec
from nitsum.plan import Group, is_power_of_two
from nitsum.shape import Geometry, round_up

ROW_MARGIN = 16
"""Positions of a row past `max_model_len`: steps run ahead of the host and may draw beyond it."""

SPAWN = get_context("spawn")
"""No process with sockets or threads is forked: both would be copied."""


class Region:
    """Zeroed memory that new processes map; pickles into a process being started only.

    Pages are committed when touched, so a generous size costs nothing.
    """

    def __init__(self, size_bytes: int) -> None:
        self._adopt(_anonymous_file(), size_bytes)
        os.ftruncate(self._fd, self.size_bytes)

    def _adopt(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self.size_bytes = max(size_bytes, mmap.PAGESIZE)
        self._mapped: mmap.mmap | None = None
        self.close = weakref.finalize(self, os.close, fd)
        """Drop the descriptor; maps made before stay valid."""

    def map(self) -> mmap.mmap:
        """The region as one writable buffer of this process; the same at every call."""
        if self._mapped is None:
            self._mapped = mmap.mmap(self._fd, self.size_bytes)
        return self._mapped

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_region, (DupFd(self._fd), self.size_bytes)


def _rebuild_region(fd: Any, size_bytes: int) -> Region:
    region = Region.__new__(Region)
    region._adopt(fd.detach(), size_bytes)  # pyright: ignore[reportPrivateUsage]
    return region


def _anonymous_file() -> int:
    """Not in /dev/shm, which is 64 MiB in a container unless somebody thought of it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nitsum")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class BarrierTimeout(Exception):
    """`missing` are the members that have not arrived."""

    def __init__(self, missing: list[int]) -> None:
        super().__init__(f"members {missing} did not arrive")
        self.missing = missing


class Barrier:
    """All of `num_members` (a power of two) wait for each other, in log2 rounds of pairs.

    In round k, member i wakes member i XOR 2^k and sleeps until woken by it. Each pair has its own
    semaphore a round, posted by one process only, so a fast member that is already at the next
    barrier only leaves a count behind and can never be mistaken for somebody else.
    """

    def __init__(self, num_members: int) -> None:
        assert is_power_of_two(num_members), num_members
        num_rounds = num_members.bit_length() - 1
        self._signals = [[_semaphore() for _ in range(num_rounds)] for _ in range(num_members)]
        self._arrivals = Region(8 * num_members)

    @property
    def num_members(self) -> int:
        return len(self._signals)

    def wait(self, member: int, timeout_s: float) -> None:
        """Sleep until everybody is here; raises `BarrierTimeout` after `timeout_s` in one round."""
        self._counts()[member] += 1
        for k, woken in enumerate(self._signals[member]):
            self._signals[member ^ 1 << k][k].release()
            if not woken.acquire(True, timeout_s):
                raise BarrierTimeout(self._missing(member))

    def _counts(self) -> memoryview[int]:
        return memoryview(self._arrivals.map()).cast("q")

    def _missing(self, member: int) -> list[int]:
        counts = self._counts()
        return [i for i in range(self.num_members) if counts[i] < counts[member]]


def _semaphore() -> Semaphore:
    return SPAWN.Semaphore(0)


class Progress:
    """How many messages each rank has completed since its generation started."""

    def __init__(self, region: Region) -> None:
        self._counts = memoryview(region.map()).cast("q")
        self._lock = threading.Lock()
        self._lock.acquire()

    def completed(self, rank: int) -> int:
        """What `rank` wrote before this count is visible after the call."""
        count = self._counts[rank]
        self._fence()
        return count

    def advance(self, rank: int) -> None:
        """All that this process wrote before becomes visible no later than the new count."""
        self._fence()
        self._counts[rank] += 1

    def wait_for(self, rank: int, count: int, timeout_s: float) -> None:
        """Sleep until `rank` has completed `count` messages; raises `WorkerDied` if it does not."""
        deadline_s = time.monotonic() + timeout_s
        pause_s = 50e-6
        while self.completed(rank) < count:
            if time.monotonic() > deadline_s:
                raise WorkerDied(
                    f"waited {timeout_s:g} s for rank {rank} to complete message {count}; "
                    f"it is at {self.completed(rank)}."
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1e-3)

    def _fence(self) -> None:
        """Lock functions synchronise memory (POSIX 4.12); a plain store on ARM does not."""
        self._lock.release()
        self._lock.acquire()


class Areas(NamedTuple):
    """Byte offsets of the parts of a group's buffer."""

    partials: int
    """float32 [degree, max_tokens, hidden]: what each shard adds to the sum."""
    sums: int
    """float32 [max_tokens, hidden]: the sum, each part of it written by one shard."""
    logits: int
    """float32 [max_samples, vocab]."""
    drawn: int
    """int64 [max_samples]: tokens, from the leader."""


@dataclass(frozen=True)
class CommLayout:
    """Where a group's buffer holds what.

    There are two copies of each area, used in turn: with one barrier a call, a member that writes
    its next value cannot hit one that still reads the last.
    """

    degree: int
    max_tokens: int
    hidden_size: int
    max_samples: int
    vocab_size: int
    """Padded."""

    def copies(self) -> tuple[Areas, Areas]:
        starts = self._starts()
        return Areas(*starts[:4]), Areas(*starts[4:8])

    @property
    def size_bytes(self) -> int:
        """Of the whole buffer; a group of one rank needs none."""
        return 0 if self.degree == 1 else self._starts()[-1]

    def _starts(self) -> list[int]:
        """Where the areas of both copies begin, each on a cache line; the last one is the end."""
        hidden_bytes = 4 * self.max_tokens * self.hidden_size
        logits_bytes = 4 * self.max_samples * self.vocab_size
        sizes = (self.degree * hidden_bytes, hidden_bytes, logits_bytes, 8 * self.max_samples)
        starts = [0]
        for size in sizes + sizes:
            starts.append(starts[-1] + round_up(size, 64))
        return starts


@dataclass(frozen=True)
class GroupShared:
    """What the ranks of one group share."""

    barrier: Barrier
    buffer: Region


@dataclass(frozen=True)
class Shared:
    """All that the processes of one generation share; see the module's drawing."""

    arenas: tuple[Region, ...]
    rows: tuple[Region, ...]
    progress: Region
    groups: tuple[GroupShared, ...]
    """In the order of `WorkerSpec.groups`; GPU ranks have none here."""
    hosts: tuple[Region, ...] = ()
    """Host memory of each rank, for KV that has to leave its arena."""


# --- how much of each a worker's spec asks for ---------------------------------------------------

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def row_tokens(spec: WorkerSpec) -> int:
    """Length of one slot's row."""
    return spec.max_model_len + ROW_MARGIN


def comm_layout(spec: WorkerSpec, geometry: Geometry, group: Group) -> CommLayout:
    """The buffer of one group: room for the largest step and for a token of each of its slots."""
    return CommLayout(
        degree=group.degree,
        max_tokens=spec.max_batch_tokens,
        hidden_size=geometry.shape.hidden_size,
        max_samples=min(spec.max_batch_tokens, spec.max_slots),
        vocab_size=geometry.vocab_size,
    )


def allocate(spec: WorkerSpec, geometry: Geometry) -> Shared:
    """Fresh memory for the generation of which `spec` describes one rank.

    GPU ranks share memory of their devices, which they map themselves; here, only their progress
    and the host memory for KV that has to leave an arena.
    """
    on_host = spec.device == "cpu"
    unit_bytes = geometry.unit_bytes(spec.block_tokens, DTYPE_BYTES[spec.dtype])
    arena_bytes = spec.num_units * unit_bytes if on_host else 0
    host_bytes = spec.num_host_units * unit_bytes
    row_bytes = 4 * spec.max_slots * row_tokens(spec) if on_host else 0
    layouts = [comm_layout(spec, geometry, group) for group in spec.groups] if on_host else []
    ranks = range(spec.num_ranks)
    return Shared(
        arenas=tuple(Region(arena_bytes) for _ in ranks),
        rows=tuple(Region(row_bytes) for _ in ranks),
        progress=Region(8 * spec.num_ranks),
        groups=tuple(
            GroupShared(Barrier(layout.degree), Region(layout.size_bytes)) for layout in layouts
        ),
        hosts=tuple(Region(host_bytes) for _ in ranks),
    )
