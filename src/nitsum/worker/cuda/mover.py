"""The mover on a GPU: one gather kernel that reads peers' arenas, ordered by events.

    pre-copy      side stream, few programs, beside steps     no rows, some source is a peer
    tail          main stream, all programs                   brings rows: the last step is done
    relocation    main stream, all programs                   inside one rank
    save, load    host stream, few programs, beside steps     to and from host memory

What runs beside steps starts after all that was launched before it, since its units may have been
in use until then, and whoever needs its units later waits for its event.

Peers rely on a count of this rank's messages, which its main stream writes (`signals`). A load that
a switch builds on, or a save that a peer loads, is no part of that stream: while copies of the host
stream are under way, that stream writes the counts, behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nitsum.kernels.gather import gather_units
from nitsum.messages import Fault, Move, Pull, RowPull
from nitsum.worker.cuda.host import HostUnits
from nitsum.worker.cuda.ordering import (
    Precopies,
    concerns_host,
    runs_beside_steps,
    units_of_move,
)
from nitsum.worker.cuda.rows import RowPuller
from nitsum.worker.cuda.signals import Signals
from nitsum.worker.cuda.state import record_event, to_host, upload
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
    portions: tuple[torch.cuda.Event, ...] = ()
    """Ends of its parts, where others may go on before `end`."""


class CudaMover:
    """Obeys `Move` on one rank."""

    def __init__(
        self,
        rank: int,
        arenas: Shared,
        unit_rows: tuple[torch.Tensor, ...],
        rows: RowPuller,
        signals: Signals,
        host: HostUnits,
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
        self._host = host
        self._host_stream = torch.cuda.Stream(device)
        self._copying: torch.cuda.Event | None = None
        """The end of the newest copies of that stream, until it is seen to have happened."""
        self.precopies: Precopies[torch.cuda.Event] = Precopies()

    def warm_up(self) -> None:
        """Load all kernels of moves: the first switch must not wait for them. Arenas hold nothing
        yet, and of a row one number is pulled."""
        peers = [rank for rank in range(len(self._units)) if rank != self._rank]
        pulls = [Pull(rank, [0], [0]) for rank in peers]
        rows = [RowPull(rank, 0, 0, 1) for rank in range(len(self._units))]
        after = [(rank, 0) for rank in peers]
        moves = [Move(0, pulls, [], after), Move(0, pulls, rows, after)]
        if len(self._host):
            moves.append(Move(0, [], saves=[Pull(self._rank, [0], [0])]))
            moves += [Move(0, [], loads=[Pull(rank, [0], [0])]) for rank in range(len(self._host))]
        for move in moves:
            self.finish(self.launch(move))
        torch.cuda.synchronize()

    def finish(self, launched: Launched) -> None:
        """It has ended: nobody needs to wait for it any more."""
        self.precopies.done(launched.end, *launched.portions)

    def count(self, num_obeyed: int) -> None:
        """Tell peers, once it is so, that as many messages are completed."""
        if self._copying is None:
            self._signals.write(num_obeyed)
            return
        main = torch.cuda.current_stream()
        if self._copying.query():
            self._copying = None
            main.wait_stream(self._host_stream)  # nothing but counts is left there
            self._signals.write(num_obeyed)
            return
        self._host_stream.wait_stream(main)
        with torch.cuda.stream(self._host_stream):
            self._signals.write(num_obeyed)

    def launch(self, move: Move) -> Launched:
        """Put the move on its stream, which does all the waiting."""
        if concerns_host(move):
            return self._launch_beside_host(move)
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

    def _launch_beside_host(self, move: Move) -> Launched:
        """Its units are waited for portion by portion."""
        stream = self._host_stream
        stream.wait_stream(torch.cuda.current_stream())
        for event in self.precopies.touching(units_of_move(move, self._rank)):
            stream.wait_event(event)
        portions: list[torch.cuda.Event] = []
        with torch.cuda.stream(stream):
            self._signals.wait(move.after)
            start = record_event()
            for units in self._host.copy(move):
                portions.append(record_event())
                self.precopies.add(units, portions[-1])
            late = to_host(self._signals.late)
            end = self._copying = record_event()
        num_bytes = self._host.num_bytes(move)
        return Launched(start, end, num_bytes, True, late, tuple(portions))

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
