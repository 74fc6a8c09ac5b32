"""KV in host memory: pinned, mapped by the device, filled and emptied by the mover's kernel.

    arena  --- save: own units out ---->  own host memory           read by any rank's device
    arena  <-- load: units of any rank --  host memory of its rank

The kernel reads and writes host memory in place, over PCIe, a portion of the units at a time. Who
needs units of a portion waits for that portion and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nitsum.errors import ConfigError
from nitsum.kernels.gather import gather_units
from nitsum.messages import Move
from nitsum.worker.cuda.state import upload

PORTION_BYTES = 32 << 20
"""About 0.6 ms of a PCIe 5 link."""

HOST_PROGRAMS = 16
"""Each has 32 KiB under way: more than a link's rate times its delay, and few of 132 SMs."""

_ALIGNED = 4
"""Numbers between counts, and units a portion is a multiple of: parts of the one upload then begin
at 16 bytes, as kernels were compiled for."""

_PORTABLE_AND_MAPPED = 3
"""Flags of `cudaHostRegister`."""

Table = list[tuple[int, int, int]]
"""(source rank, source unit, destination unit)"""


def pin(rows: torch.Tensor) -> None:
    """Let the device reach host memory `rows` by its address; it is touched by this.

    Raises `ConfigError` if the system cannot pin as much.
    """
    status = torch.cuda.cudart().cudaHostRegister(  # pyright: ignore
        rows.data_ptr(), rows.nbytes, _PORTABLE_AND_MAPPED
    )
    if int(status):
        raise ConfigError(
            f"{rows.nbytes / 2**30:.1f} GiB of host memory for KV cannot be pinned (CUDA error "
            f"{int(status)}). Lower --host-kv-memory, or give the machine or container more memory."
        )


class HostUnits:
    """Host memory of all ranks beside the arena of one."""

    def __init__(
        self,
        rank: int,
        arena: torch.Tensor,
        hosts: Sequence[torch.Tensor],
        portion_bytes: int = PORTION_BYTES,
    ) -> None:
        """`arena` [2 * layers, units, elements] is this rank's; `hosts`, by rank, are the same in
        pinned host memory. There may be none."""
        device = arena.device
        self._rank = rank
        self._arena = arena
        self._hosts = tuple(hosts)
        self._arena_base = _addresses([arena], device)
        self._host_bases = _addresses(hosts, device)
        self._arena_size = torch.tensor([arena.shape[1]], device=device)
        self._host_sizes = torch.tensor([host.shape[1] for host in hosts], device=device)
        self._unit_bytes = arena.shape[0] * arena.shape[2] * arena.element_size()
        units = portion_bytes // self._unit_bytes // _ALIGNED * _ALIGNED
        self._portion_units = max(_ALIGNED, units)

    def __len__(self) -> int:
        """Ranks that have host memory."""
        return len(self._hosts)

    def num_bytes(self, move: Move) -> int:
        return self._unit_bytes * sum(len(pull.src_units) for pull in (*move.saves, *move.loads))

    def copy(self, move: Move) -> Iterator[list[int]]:
        """Launch the move's saves or loads on the current stream; after each portion, the units of
        the arena that are in it."""
        assert not move.pulls, "a message that concerns host memory does nothing else"
        assert not move.rows, "a message that concerns host memory does nothing else"
        assert not move.saves or not move.loads, "a message saves or loads"
        if move.saves:
            table = [
                (0, unit, place)
                for pull in move.saves
                for unit, place in zip(pull.src_units, pull.dst_units, strict=True)
            ]
            bases, sizes, dst = self._arena_base, self._arena_size, self._hosts[self._rank]
        else:
            table = [
                (pull.src_rank, place, unit)
                for pull in move.loads
                for place, unit in zip(pull.src_units, pull.dst_units, strict=True)
            ]
            bases, sizes, dst = self._host_bases, self._host_sizes, self._arena
        column = 1 if move.saves else 2
        for part in self._launch(table, bases, sizes, dst):
            yield [line[column] for line in part]

    def _launch(
        self, table: Table, bases: torch.Tensor, sizes: torch.Tensor, dst: torch.Tensor
    ) -> Iterator[Table]:
        parts = portions(table, self._portion_units)
        counts, moves = _upload(parts, self._arena.device)
        first = 0
        for part, count in zip(parts, counts, strict=True):
            gather_units(
                bases,
                sizes,
                moves[first : first + len(part)],
                count[:1],
                dst,
                layers=range(dst.shape[0] // 2),
                num_programs=HOST_PROGRAMS,
            )
            first += len(part)
            yield part


def portions(table: Table, size: int) -> list[Table]:
    """`table` in parts of `size`, in order; the last may be smaller."""
    return [table[first : first + size] for first in range(0, len(table), size)]


def _upload(parts: list[Table], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [parts, 4], of which the first of each line counts, and the whole table [n, 3]."""
    numbers = [number for part in parts for number in (len(part), *[0] * (_ALIGNED - 1))]
    at = len(numbers)
    numbers += [number for part in parts for line in part for number in line]
    uploaded = upload(torch.tensor(numbers, dtype=torch.int32), device)
    return uploaded[:at].view(-1, _ALIGNED), uploaded[at:].view(-1, 3)


def _addresses(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor([one.data_ptr() for one in rows], dtype=torch.int64, device=device)
