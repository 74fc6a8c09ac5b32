"""KV into host memory and back, inside one process."""

from __future__ import annotations

import torch

from nitsum.messages import Move, Pull
from nitsum.shape import Geometry
from nitsum.shared import Progress, Shared, allocate
from nitsum.worker.arena import Arena
from nitsum.worker.move import Mover
from tests.processes.pool import SHAPE, make_spec
from tests.processes.ranks import fill, memory_of

NUM_RANKS = 2
NUM_HOST_UNITS = 6
SPEC = make_spec(NUM_RANKS, num_host_units=NUM_HOST_UNITS)


def make_shared() -> Shared:
    shared = allocate(SPEC, Geometry(SHAPE, SPEC.max_tp))
    for rank in range(NUM_RANKS):
        fill(shared, rank)
    return shared


def hosts(shared: Shared) -> list[Arena]:
    geometry = Geometry(SHAPE, SPEC.max_tp)
    return [Arena(r, geometry, NUM_HOST_UNITS, SPEC.block_tokens) for r in shared.hosts]


def mover(shared: Shared, rank: int) -> Mover:
    arenas, rows = memory_of(shared)
    return Mover(rank, arenas, rows, Progress(shared.progress), 5.0, None, hosts(shared))


def units(shared: Shared, rank: int) -> torch.Tensor:
    return memory_of(shared)[0][rank].unit_rows()


def test_what_was_saved_comes_back_elsewhere():
    shared = make_shared()
    before = units(shared, 0).clone()
    saved = mover(shared, 0).move(Move(1, [], saves=[Pull(0, [3, 9], [5, 0])]))
    units(shared, 0)[:, [3, 9]] = 0.0
    mover(shared, 0).move(Move(2, [], loads=[Pull(0, [5, 0], [20, 21])]))
    torch.testing.assert_close(units(shared, 0)[:, [20, 21]], before[:, [3, 9]], rtol=0, atol=0)
    assert saved.bytes == 2 * Geometry(SHAPE, SPEC.max_tp).unit_bytes(SPEC.block_tokens, 4)


def test_a_peer_loads_what_another_saved():
    shared = make_shared()
    before = units(shared, 1).clone()
    mover(shared, 1).move(Move(1, [], saves=[Pull(1, [7], [2])]))
    mover(shared, 0).move(Move(2, [], loads=[Pull(1, [2], [4])]))
    torch.testing.assert_close(units(shared, 0)[:, 4], before[:, 7], rtol=0, atol=0)


def test_saving_reads_before_a_load_of_the_same_message_writes():
    shared = make_shared()
    before = units(shared, 0).clone()
    mover(shared, 0).move(Move(1, [], saves=[Pull(0, [1], [0])]))
    both = Move(2, [], saves=[Pull(0, [2], [1])], loads=[Pull(0, [0], [2])])
    mover(shared, 0).move(both)
    torch.testing.assert_close(units(shared, 0)[:, 2], before[:, 1], rtol=0, atol=0)
    host = hosts(shared)[0].unit_rows()
    torch.testing.assert_close(host[:, 1], before[:, 2], rtol=0, atol=0)
