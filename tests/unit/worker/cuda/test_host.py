"""KV to host memory and back by the mover's kernel, a portion at a time."""

from __future__ import annotations

import pytest
import torch

from nitsum.messages import Move, Pull
from nitsum.worker.cuda.host import HostUnits, portions
from tests.unit.kernels.kit import DEVICE, randn

PLANES, ARENA_UNITS, HOST_UNITS, ELEMENTS = 4, 40, 24, 8
UNIT_BYTES = 4 * PLANES * ELEMENTS


class Ranks:
    """Two ranks on one device; host memory as the device sees it."""

    def __init__(self) -> None:
        pin = DEVICE == "cuda"
        self.arenas = [randn(PLANES, ARENA_UNITS, ELEMENTS, seed=rank) for rank in range(2)]
        self.hosts = [torch.zeros(PLANES, HOST_UNITS, ELEMENTS, pin_memory=pin) for _ in range(2)]
        self.units = [
            HostUnits(rank, arena, self.hosts, portion_bytes=8 * UNIT_BYTES)
            for rank, arena in enumerate(self.arenas)
        ]

    def copy(self, rank: int, move: Move) -> list[list[int]]:
        found = list(self.units[rank].copy(move))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found


def test_what_was_saved_comes_back_elsewhere() -> None:
    ranks = Ranks()
    before = ranks.arenas[0].clone()
    units, places = list(range(3, 21)), list(reversed(range(18)))
    parts = ranks.copy(0, Move(1, [], saves=[Pull(0, units, places)]))
    assert [len(part) for part in parts] == [8, 8, 2]
    assert [unit for part in parts for unit in part] == units
    assert torch.equal(ranks.hosts[0][:, places], before[:, units].cpu())
    assert not ranks.hosts[0][:, 18:].any()
    goals = list(range(22, 40))
    parts = ranks.copy(0, Move(2, [], loads=[Pull(0, places, goals)]))
    assert [unit for part in parts for unit in part] == goals
    assert torch.equal(ranks.arenas[0][:, goals], before[:, units])
    assert torch.equal(ranks.arenas[0][:, :22], before[:, :22])


def test_one_load_reads_what_several_ranks_saved() -> None:
    ranks = Ranks()
    before = [arena.clone() for arena in ranks.arenas]
    for rank in range(2):
        ranks.copy(rank, Move(1, [], saves=[Pull(rank, [7, 5], [2, 9])]))
    ranks.copy(1, Move(2, [], loads=[Pull(0, [9], [30]), Pull(1, [2, 9], [31, 0])]))
    assert torch.equal(ranks.arenas[1][:, 30], before[0][:, 5])
    assert torch.equal(ranks.arenas[1][:, [31, 0]], before[1][:, [7, 5]])
    assert torch.equal(ranks.arenas[0], before[0])
    assert ranks.units[1].num_bytes(Move(2, [], loads=[Pull(0, [9], [30])])) == UNIT_BYTES


def test_other_copies_in_the_same_message_are_our_mistake() -> None:
    ranks = Ranks()
    save, load = Pull(0, [1], [2]), Pull(0, [3], [4])
    for move in (Move(1, [load], saves=[save]), Move(1, [], saves=[save], loads=[load])):
        with pytest.raises(AssertionError):
            ranks.copy(0, move)


def test_portions_keep_the_order() -> None:
    table = [(0, i, i) for i in range(9)]
    assert portions(table, 4) == [table[:4], table[4:8], table[8:]]
    assert portions([], 4) == []
