"""What tests have ranks do: functions that run inside the processes of a pool."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

from nitsum.errors import WorkerDied
from nitsum.messages import Move, WorkerSpec
from nitsum.plan import Group
from nitsum.shape import Geometry
from nitsum.shared import Progress, Shared, comm_layout, row_tokens
from nitsum.worker.arena import Arena
from nitsum.worker.comm import GroupComm
from nitsum.worker.move import Mover
from nitsum.worker.slots import map_rows
from tests.processes.pool import SHAPE, make_spec

torch.set_num_threads(1)
_COMMS: dict[tuple[Group, int], GroupComm] = {}


def _geometry(spec: WorkerSpec) -> Geometry:
    return Geometry(SHAPE, spec.max_tp)


def comm_of(shared: Shared, group: Group, rank: int) -> GroupComm:
    """A rank's one `GroupComm` of a group: whose turn it is lives in it."""
    if (group, rank) not in _COMMS:
        spec = make_spec(len(shared.arenas))
        layout = comm_layout(spec, _geometry(spec), group)
        index = spec.groups.index(group)
        _COMMS[group, rank] = GroupComm(group, rank, shared.groups[index], layout, spec.timeout_s)
    return _COMMS[group, rank]


def partial(rank: int, size: tuple[int, int], call: int) -> torch.Tensor:
    """What a rank adds to the `call`-th sum."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randn(size, generator=generator)


def all_reduce(
    shared: Shared, group: Group, rank: int, size: tuple[int, int], num_calls: int
) -> list[torch.Tensor]:
    comm = comm_of(shared, group, rank)
    return [comm.all_reduce(partial(rank, size, call)).clone() for call in range(num_calls)]


def mixed_calls(shared: Shared, group: Group, rank: int, num_steps: int) -> list[list[float]]:
    """As a step does: two sums, the vocabulary, the leader's tokens; all of them as numbers."""
    comm = comm_of(shared, group, rank)
    vocab = torch.arange(204.0).repeat(3, 1).chunk(comm.degree, 1)[comm.shard]
    results: list[list[float]] = []
    for step in range(num_steps):
        sums = [comm.all_reduce(torch.full((5, 8), float(step + rank))) for _ in range(2)]
        gathered = comm.gather_vocab(vocab + step)
        tokens = [step, step + 1, step + 2] if comm.is_leader else None
        drawn = comm.broadcast(tokens, 3)
        results.append([sums[0][0, 0].item(), sums[1][4, 7].item(), *gathered[2].tolist(), *drawn])
    return results


def time_all_reduce(
    shared: Shared, group: Group, rank: int, size: tuple[int, int], num_calls: int
) -> float:
    """Median seconds of one sum."""
    comm = comm_of(shared, group, rank)
    x = torch.ones(size)
    times: list[float] = []
    for _ in range(num_calls):
        started_s = time.perf_counter()
        comm.all_reduce(x)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def wait_for_a_late_one(
    shared: Shared, group: Group, rank: int, pause_s: float
) -> tuple[float, float]:
    """A sum to which the leader comes `pause_s` late: what this rank waited, then and since."""
    comm = comm_of(shared, group, rank)
    comm.all_reduce(torch.zeros(1, 8))
    comm.take_waited_s()
    time.sleep(pause_s if comm.is_leader else 0.0)
    comm.all_reduce(torch.zeros(1, 8))
    return comm.take_waited_s(), comm.take_waited_s()


def wait_alone(shared: Shared, group: Group, rank: int) -> str:
    """The message of a collective that nobody else joins."""
    comm = comm_of(shared, group, rank)
    comm.timeout_s = 0.2
    try:
        comm.all_reduce(torch.zeros(1, 8))
    except WorkerDied as error:
        return str(error)
    finally:
        comm.timeout_s = 20.0
    return "nobody was missed"


# --- moving -----------------------------------------------------------------------------------


@cache
def _memory(num_ranks: int) -> WorkerSpec:
    return make_spec(num_ranks)


def memory_of(shared: Shared) -> tuple[list[Arena], list[torch.Tensor]]:
    """Arenas and rows of all ranks."""
    spec = _memory(len(shared.arenas))
    arenas = [
        Arena(region, _geometry(spec), spec.num_units, spec.block_tokens)
        for region in shared.arenas
    ]
    rows = [map_rows(region, spec.max_slots, row_tokens(spec)) for region in shared.rows]
    return arenas, rows


def fill(shared: Shared, rank: int) -> None:
    """Every number of a rank's arena and rows says whose it is and where."""
    arenas, rows = memory_of(shared)
    units = arenas[rank].unit_rows()
    units.copy_(
        1000 * rank
        + torch.arange(units.shape[1])[None, :, None]
        + torch.arange(units.shape[0])[:, None, None] / 64
    )
    rows[rank].copy_(10000 * rank + torch.arange(rows[rank].numel()).view(rows[rank].shape))


def move_and_advance(shared: Shared, rank: int, move: Move) -> int:
    """Obey, count it as completed, and return the bytes that were moved."""
    arenas, rows = memory_of(shared)
    progress = Progress(shared.progress)
    done = Mover(rank, arenas, rows, progress, 20.0).move(move)
    progress.advance(rank)
    return done.bytes


def advance_later(shared: Shared, rank: int, pause_s: float) -> float:
    """Complete a message after a pause; when that was."""
    time.sleep(pause_s)
    now_s = time.monotonic()
    Progress(shared.progress).advance(rank)
    return now_s


def move_when_told(shared: Shared, rank: int, move: Move) -> float:
    """When the move was over."""
    move_and_advance(shared, rank, move)
    return time.monotonic()
