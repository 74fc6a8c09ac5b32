"""The mover: a destination rank pulls KV units and rows out of its peers' memory.

The source neither does nor knows anything. All that a `Move` reads is read before the first byte
is written, so that units may trade places within one message.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nitsum.messages import Fault, Move, MoveDone, Pull, RowPull
from nitsum.shared import Progress
from nitsum.worker.arena import Arena


class _Bytes(NamedTuple):
    """Something read, and where it goes: `destination[:, places] = data`."""

    places: torch.Tensor
    data: torch.Tensor


class Mover:
    """Obeys `Move` on one rank; arenas and rows of all ranks, by rank."""

    def __init__(
        self,
        rank: int,
        arenas: Sequence[Arena],
        rows: Sequence[torch.Tensor],
        progress: Progress,
        timeout_s: float,
        fault: Fault | None = None,
        hosts: Sequence[Arena] = (),
    ) -> None:
        """`hosts`: host memory of all ranks, by rank, for KV that has to leave the arena."""
        self._rank = rank
        self._hosts = [host.unit_rows() for host in hosts]
        self._units = [arena.unit_rows() for arena in arenas]
        self._rows = rows
        self._progress = progress
        self._timeout_s = timeout_s
        self._fault: Fault | None = fault

    def move(self, move: Move) -> MoveDone:
        """Wait for the peers named in `after`, then copy; raises `WorkerDied` if one is late."""
        started_s = time.monotonic()
        for rank, count in move.after:
            self._progress.wait_for(rank, count, self._timeout_s)
        num_bytes = self._copy(with_fault(move, self._fault))
        return MoveDone(move.move_id, self._rank, time.monotonic() - started_s, num_bytes)

    def _copy(self, move: Move) -> int:
        units = [_gather(self._units, pull) for pull in move.pulls if pull.src_units]
        units += [_gather(self._hosts, load) for load in move.loads]
        saved = [_gather(self._units, save) for save in move.saves]
        rows = [(pull, self._read_row(pull)) for pull in move.rows]
        for places, data in units:
            self._units[self._rank].index_copy_(1, places, data)
        for places, data in saved:
            self._hosts[self._rank].index_copy_(1, places, data)
        for pull, tokens in rows:
            self._rows[self._rank][pull.dst_slot, : pull.num_tokens] = tokens
        num_bytes = sum(_num_bytes(read.data) for read in (*units, *saved))
        return num_bytes + sum(_num_bytes(tokens) for _, tokens in rows)

    def _read_row(self, pull: RowPull) -> torch.Tensor:
        return self._rows[pull.src_rank][pull.src_slot, : pull.num_tokens].clone()


def _gather(memories: Sequence[torch.Tensor], pull: Pull) -> _Bytes:
    """All layers, K and V, of all units of one rank in one gather."""
    data = memories[pull.src_rank].index_select(1, torch.tensor(pull.src_units))
    return _Bytes(torch.tensor(pull.dst_units), data)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- faults, planted to prove that verification can fail ------------------------------------------


def with_fault(move: Move, fault: Fault | None) -> Move:
    """`move` as a mover with this fault would understand it."""
    pulls, rows = move.pulls, move.rows
    if fault == "swap-heads":
        pulls = [_swapped(pull) for pull in pulls]
    elif fault == "stale-block":
        pulls = [_shortened(pull) for pull in pulls]
    elif fault == "lost-tail" and rows:
        pulls, rows = [], [_without_last(pull) for pull in rows]
    else:
        return move
    return Move(move.move_id, pulls, rows, saves=move.saves, loads=move.loads)


def _swapped(pull: Pull) -> Pull:
    """The neighbouring unit: other heads of the same block, where it has several units."""
    return Pull(pull.src_rank, [unit ^ 1 for unit in pull.src_units], pull.dst_units)


def _shortened(pull: Pull) -> Pull:
    """What the first two units belong in stays what it was; the last ones may not be in use yet."""
    return Pull(pull.src_rank, pull.src_units[2:], pull.dst_units[2:])


def _without_last(pull: RowPull) -> RowPull:
    """The last drawn token does not come along."""
    return RowPull(pull.src_rank, pull.src_slot, pull.dst_slot, pull.num_tokens - 1)
