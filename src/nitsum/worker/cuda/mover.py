"""The mover on a GPU: one gather kernel that reads peers' arenas, ordered by events.

    pre-copy      side stream, few programs, beside steps     no rows, some source is a peer
    tail          main stream, all programs                   brings rows: the last step is done
    relocation    main stream, all programs                   inside one rank

A pre-copy starts after all that was launched before it, since its destination units may have been
in use until then, and whoever needs its units later waits for its event.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nitsum.kernels.gather import gather_units
from nitsum.messages import Fault, Move, Pull, RowPull
from nitsum.worker.cuda.ordering import Precopies, runs_beside_steps, units_of_move
from nitsum.worker.cuda.rows import RowPuller
from nitsum.worker.cuda.signals import Signals
from nitsum.worker.cuda.state import to_host, upload
from nitsum.worker.cuda.symmetric import Shared
from nitsum.worker.move import with_fault

PRECOPY_PROGRAMS = 16
"""Of 132 SMs: what a pre-copy may take from the steps beside it. With 4 it takes longer, and steps
suffer more: what a product loses by one SM is a whole round of its tiles."""


@dataclass(frozen=True)
class Launched:
    """A move on its way; `end` happens when it is done."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    num_bytes: int
    beside: bool
    late: torch.Tensor
    """[1] int32, pinned; to be read after `end`: see `Signals.check`."""


class CudaMover:
    """Obeys `Move` on one rank."""

    def __init__(
        self,
        rank: int,
        arenas: Shared,
        unit_rows: tuple[torch.Tensor, ...],
        rows: RowPuller,
        signals: Signals,
        fault: Fault | None = None,
    ) -> None:
        """`unit_rows`: [2 * layers, units, elements] of every rank's arena, by rank."""
        device = arenas.own.device
        self._rank = rank
        self._units = unit_rows
        self._bases = arenas.addresses()
        self._base_units = torch.tensor([units.shape[1] for units in unit_rows], device=device)
        self._rows = rows
        self._signals = signals
        self._fault: Fault | None = fault
        self._num_programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        self._side = torch.cuda.Stream(device)
        self.precopies: Precopies[torch.cuda.Event] = Precopies()

    def warm_up(self) -> None:
        """Load all kernels of moves: the first switch must not wait for them. Arenas hold nothing
        yet, and of a row one number is pulled."""
        peers = [rank for rank in range(len(self._units)) if rank != self._rank]
        pulls = [Pull(rank, [0], [0]) for rank in peers]
        rows = [RowPull(rank, 0, 0, 1) for rank in range(len(self._units))]
        after = [(rank, 0) for rank in peers]
        for move in (Move(0, pulls, [], after), Move(0, pulls, rows, after)):
            self.precopies.done(self.launch(move).end)
        torch.cuda.synchronize()

    def launch(self, move: Move) -> Launched:
        """Put the move on its stream, which does all the waiting."""
        main = torch.cuda.current_stream()
        beside = runs_beside_steps(move, self._rank)
        stream = self._side if beside else main
        if beside:
            stream.wait_stream(main)
        for event in self.precopies.touching(units_of_move(move, self._rank)):
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            launched = self._launch(move, beside)
        if beside:
            units = (unit for pull in move.pulls for unit in pull.dst_units)
            self.precopies.add(units, launched.end)
        return launched

    def _launch(self, move: Move, beside: bool) -> Launched:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._signals.wait(move.after)
        start.record()
        move = with_fault(move, self._fault)
        num_bytes = self._pull_units(move, PRECOPY_PROGRAMS if beside else self._num_programs)
        num_bytes += self._rows.pull(move.rows)
        late = to_host(self._signals.late)
        end.record()
        return Launched(start, end, num_bytes, beside, late)

    def _pull_units(self, move: Move, num_programs: int) -> int:
        table = [
            (pull.src_rank, src, dst)
            for pull in move.pulls
            for src, dst in zip(pull.src_units, pull.dst_units, strict=True)
        ]
        if not table:
            return 0
        if trades_places(table, self._rank):
            pull_by_planes(self._units, self._rank, table)
        else:
            self._gather(table, num_programs)
        own = self._units[self._rank]
        return len(table) * own.shape[0] * own.shape[2] * own.element_size()

    def _gather(self, table: list[tuple[int, int, int]], num_programs: int) -> None:
        own = self._units[self._rank]
        moves = torch.tensor(table, dtype=torch.int32)
        count = torch.tensor([len(table)], dtype=torch.int32)
        gather_units(
            self._bases,
            self._base_units,
            upload(moves, own.device),
            upload(count, own.device),
            own,
            layers=range(own.shape[0] // 2),
            num_programs=num_programs,
        )


def trades_places(table: list[tuple[int, int, int]], rank: int) -> bool:
    """Whether a unit of this rank is both read and written: no order of copies would be right."""
    read = {src for src_rank, src, _ in table if src_rank == rank}
    return any(dst in read for _, _, dst in table)


def pull_by_planes(
    units: tuple[torch.Tensor, ...], rank: int, table: list[tuple[int, int, int]]
) -> None:
    """All of a plane is read before any of it is written; planes do not touch each other.

    Slower than the kernel, and staged in the size of one plane.
    """
    device = units[rank].device
    by_rank: dict[int, tuple[list[int], list[int]]] = {}
    for src_rank, src, dst in table:
        sources, places = by_rank.setdefault(src_rank, ([], []))
        sources.append(src)
        places.append(dst)
    index = {
        src_rank: (torch.tensor(sources, device=device), torch.tensor(places, device=device))
        for src_rank, (sources, places) in by_rank.items()
    }
    for plane in range(units[rank].shape[0]):
        read = [(places, units[r][plane][sources]) for r, (sources, places) in index.items()]
        for places, data in read:
            units[rank][plane].index_copy_(0, places, data)
