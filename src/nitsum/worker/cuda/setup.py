"""From a `WorkerSpec` to a rank that is ready: load, map, warm up, measure, capture.

load      weights, straight onto the device
map       groups, their buffers, rows and words, in the order of the spec on all ranks
warm_up   the largest step of every lane, over an arena of one block: its memory is then known
arena     what is left, the same number of units on every rank
capture   decode graphs, the largest first, all members of a group together
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from nitsum.errors import ConfigError
from nitsum.kernels.prepare import StepTensors
from nitsum.messages import Join, Ready, Step, Work, WorkerSpec
from nitsum.model.cuda_ops import rope_table
from nitsum.model.ops import Heads
from nitsum.plan import Group
from nitsum.request import SamplingParams
from nitsum.shape import Geometry, ModelShape
from nitsum.shared import DTYPE_BYTES, Progress, row_tokens
from nitsum.shared import Shared as HostShared
from nitsum.worker.arena import Arena, Pages
from nitsum.worker.cuda.attention import AttentionMaker
from nitsum.worker.cuda.buckets import StepShape, chunk_shapes, decode_shapes, decode_sizes
from nitsum.worker.cuda.comm import CommSizes, CudaComm
from nitsum.worker.cuda.grammar import DeviceGrammars
from nitsum.worker.cuda.host import HostUnits, pin
from nitsum.worker.cuda.lane import CudaLane
from nitsum.worker.cuda.memory import DeviceMemory, kv_units
from nitsum.worker.cuda.mover import CudaMover
from nitsum.worker.cuda.packing import pack
from nitsum.worker.cuda.rows import RowPuller
from nitsum.worker.cuda.runner import CudaRunner
from nitsum.worker.cuda.sampling import CAPTURED, DeviceSampler
from nitsum.worker.cuda.signals import Signals
from nitsum.worker.cuda.state import DeviceState, warm_up_pinned
from nitsum.worker.cuda.symmetric import Shared, SymmetricMemory, ranks_share_devices
from nitsum.worker.grammar import GrammarMasks
from nitsum.worker.weights import ResidentWeights, load_weights, open_source

START_TIMEOUT_S = 900.0
"""How long a rank that is ready waits for one that still loads."""

GRAPH_BYTES = 12 << 20
"""What is set aside for one graph; what they really take is measured and reported."""

_T = TypeVar("_T")


@dataclass
class Parts:
    """What is made once and shared by a rank's lanes."""

    spec: WorkerSpec
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    memory: SymmetricMemory
    weights: ResidentWeights
    comms: dict[Group, CudaComm]
    state: DeviceState
    rows: Shared
    words: Shared
    tensors: StepTensors
    sampler: DeviceSampler
    grammars: DeviceGrammars
    rope: torch.Tensor


@dataclass
class Clock:
    """Seconds and device bytes of each phase."""

    phases: dict[str, float] = field(default_factory=dict[str, float])
    bytes: dict[str, int] = field(default_factory=dict[str, int])

    def timed(self, name: str, call: Callable[[], _T]) -> _T:
        started_s, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        result = call()
        torch.cuda.synchronize()
        self.phases[name] = time.monotonic() - started_s
        self.bytes[name] = free - torch.cuda.mem_get_info()[0]
        return result


@torch.inference_mode()
def start(spec: WorkerSpec, shared: HostShared) -> tuple[CudaRunner, Ready]:
    """A rank that is warm, and its report. Raises `ConfigError` if the device cannot hold it."""
    device = pick_device(spec)
    torch.cuda.set_device(device)
    torch.set_num_threads(spec.num_threads)
    clock = Clock()
    geometry = Geometry(ModelShape.from_folder(Path(spec.model)), spec.max_tp, spec.min_tp)
    weights = clock.timed("load", lambda: _load(spec, geometry, device))
    parts = clock.timed("map", lambda: _map(spec, geometry, device, weights))
    clock.timed("warm_up", lambda: _warm_up(parts))
    units = clock.timed("measure", lambda: _num_units(parts, clock.bytes["warm_up"]))
    arenas = clock.timed("arena", lambda: _allocate_arenas(parts, units))
    torch.cuda.empty_cache()  # else the room it frees would count as the graphs'
    lanes = _lanes(parts, _arena(parts, arenas.own, units))
    clock.timed("capture", lambda: _capture(parts, lanes))
    signals = Signals(parts.words, spec.rank, spec.timeout_s)
    hosts = clock.timed("host_kv", lambda: _map_hosts(parts, shared))
    mover = clock.timed("moves", lambda: _mover(parts, arenas, units, signals, hosts))
    runner = _runner(parts, lanes, mover, signals, Progress(shared.progress))
    parts.memory.barrier()
    memory, name = _memory_bytes(parts, clock), torch.cuda.get_device_name(device)
    return runner, Ready(spec.rank, units, clock.phases, memory, name)


def pick_device(spec: WorkerSpec) -> torch.device:
    """The rank's GPU; several ranks on one only where that was asked for."""
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError("PyTorch sees no GPU; `nitsum doctor` says why. Or use --device cpu.")
    if spec.num_ranks > count and not ranks_share_devices():
        raise ConfigError(f"There are {count} GPU(s) for {spec.num_ranks} ranks; lower --ranks.")
    return torch.device("cuda", spec.rank % count)


# --- the phases ----------------------------------------------------------------------------------


def _load(spec: WorkerSpec, geometry: Geometry, device: torch.device) -> ResidentWeights:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    source = open_source(
        Path(spec.model),
        geometry.shape,
        spec.load_format,
        seed=spec.seed,
        device=device,
        dtype=dtype,
    )
    weights = load_weights(geometry, spec.rank, source, dtype=dtype, device=device)
    torch.cuda.empty_cache()  # what was read and placed
    return weights


def _map(
    spec: WorkerSpec, geometry: Geometry, device: torch.device, weights: ResidentWeights
) -> Parts:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    folder = Path(spec.engine_address.removeprefix("ipc://")).parent
    memory = SymmetricMemory(
        spec.rank, spec.num_ranks, spec.groups, device, folder, START_TIMEOUT_S
    )
    max_draws = min(spec.max_batch_tokens, spec.max_num_seqs)
    sizes = CommSizes(
        spec.max_batch_tokens, geometry.shape.hidden_size, max_draws, geometry.vocab_size, dtype
    )
    comms = {
        group: CudaComm(group, spec.rank, memory, sizes, spec.fault == "wrong-vocab")
        for group in spec.groups
        if spec.rank in group.ranks
    }
    rows = memory.allocate((spec.max_slots, row_tokens(spec)), torch.int32, None)
    words = memory.allocate((1,), torch.int32, None)
    state = DeviceState(rows, spec.block_tokens, spec.max_num_seqs)
    tensors = StepTensors.empty(spec.max_batch_tokens, spec.max_num_seqs, state.max_pages, device)
    sampler = DeviceSampler(rows.own, max_draws, geometry.shape.vocab_size)
    masks = GrammarMasks(Path(spec.model), spec.num_threads)
    grammars = DeviceGrammars(rows.own, masks, geometry.shape.vocab_size)
    shape = geometry.shape
    rope = rope_table(shape.rope, shape.head_dim, row_tokens(spec), dtype, device)
    return Parts(
        spec, geometry, device, dtype, memory, weights, comms, state, rows, words, tensors,
        sampler, grammars, rope,
    )  # fmt: skip


def _warm_up(parts: Parts) -> None:
    """Every lane's largest step, drawing in every way, and one of each kind that kernels are
    compiled for on their own."""
    warm_up_pinned()
    units = parts.geometry.num_units
    arena = torch.zeros(_arena_elements(parts, units), dtype=parts.dtype, device=parts.device)
    lanes = _lanes(parts, _arena(parts, arena, units))
    for group, lane in lanes.items():
        parts.memory.barrier(group)
        for work in warm_up_works(parts.spec):
            _mixed_step(parts, group, lane, work)
    torch.cuda.synchronize()


def _mixed_step(parts: Parts, group: Group, lane: CudaLane, work: list[Work]) -> None:
    """As a runner does it, but that all draws are tried, and shaping with them."""
    joins = [Join(part.slot, [0] * part.num_tokens, 1, 0, SamplingParams()) for part in work]
    step = Step(0, 0, group, joins, [], work)
    shape = lane.shape_for(work)
    parts.state.take_in(pack(step, lane.comm.member, shape.num_seqs, parts.state.max_pages))
    parts.sampler.join(joins)
    logits, draws, _, _ = lane.compute(shape, work)
    if not len(logits):
        return
    raw = logits.clone()  # as when a request wants to see what others shape
    longest = max(part.num_tokens for part in work)
    shaping = [needs._replace(shapes_logits=True) for needs in CAPTURED]
    for needs in (*CAPTURED, *shaping):
        parts.sampler.draw(logits, draws, needs, lane.comm, longest)
    parts.grammars.warm_up(logits)
    del raw


def warm_up_works(spec: WorkerSpec) -> list[list[Work]]:
    """The largest step first. Triton compiles anew for numbers divisible by 16, for 1, for each
    padded number of sequences, and our kernels for few tokens and for many."""
    tokens = (spec.max_batch_tokens, spec.max_batch_tokens - 1, 272, 257, 48, 33)
    num_seqs = (spec.max_num_seqs, 16, 3, 1)
    sizes = [(n, s) for s in num_seqs for n in tokens]
    sizes += [(2 * s, s) for s in decode_sizes(spec.max_num_seqs)]  # as many draws
    return [
        spread_work(min(n, spec.max_batch_tokens), min(s, spec.max_num_seqs), spec.max_model_len)
        for n, s in sizes
    ]


def spread_work(num_tokens: int, num_seqs: int, max_model_len: int) -> list[Work]:
    """So many tokens over so many sequences (each at least one), all of which draw."""
    num_seqs = min(num_seqs, num_tokens)
    each, more = divmod(num_tokens, num_seqs)
    return [Work(i, 0, min(each + (i < more), max_model_len), True) for i in range(num_seqs)]


def _num_units(parts: Parts, largest_step_bytes: int) -> int:
    """The spec's number, or as many as fit beside what is there by now and graphs."""
    spec, geometry = parts.spec, parts.geometry
    if spec.num_units:
        return spec.num_units
    parts.memory.barrier()
    free, total = torch.cuda.mem_get_info()
    sharing = -(-spec.num_ranks // torch.cuda.device_count())
    unit_bytes = geometry.unit_bytes(spec.block_tokens, DTYPE_BYTES[spec.dtype])
    memory = DeviceMemory(free, total, sharing)
    reserve = _graph_reserve(parts, largest_step_bytes)
    units = kv_units(memory, reserve, spec.gpu_memory_share, geometry, unit_bytes)
    return parts.memory.smallest(units)


def _graph_reserve(parts: Parts, largest_step_bytes: int) -> int:
    """Room for graphs: what the driver keeps of each, the logits each decode shape holds, and
    their pool, which is below what the largest step needs."""
    shapes = graph_shapes(parts.spec) * len(parts.comms)
    decodes = sum(shape.num_seqs for shape in shapes if shape.is_decode)
    logits_bytes = 4 * decodes * parts.geometry.vocab_size
    return len(shapes) * GRAPH_BYTES + logits_bytes + largest_step_bytes


def _allocate_arenas(parts: Parts, num_units: int) -> Shared:
    return parts.memory.allocate((_arena_elements(parts, num_units),), parts.dtype, None)


def _arena_elements(parts: Parts, num_units: int) -> int:
    unit_bytes = parts.geometry.unit_bytes(parts.spec.block_tokens, DTYPE_BYTES[parts.spec.dtype])
    return num_units * unit_bytes // DTYPE_BYTES[parts.spec.dtype]


def _arena(parts: Parts, flat: torch.Tensor, num_units: int) -> Arena:
    return Arena(flat, parts.geometry, num_units, parts.spec.block_tokens, parts.dtype)


def _lanes(parts: Parts, arena: Arena) -> dict[Group, CudaLane]:
    return {
        group: CudaLane(
            parts.geometry,
            parts.weights.views(group.degree, comm.shard),
            comm,
            _pages(arena, group),
            parts.state,
            parts.tensors,
            parts.sampler,
            parts.rope,
            _attention(parts, group, comm.shard),
        )
        for group, comm in parts.comms.items()
    }


def _attention(parts: Parts, group: Group, shard: int) -> AttentionMaker:
    heads = Heads.of(parts.geometry, group.degree, shard)
    return AttentionMaker(heads, parts.spec, parts.state.max_pages, parts.device)


def _pages(arena: Arena, group: Group) -> Pages:
    return arena.pages(group.degree)


def _capture(parts: Parts, lanes: dict[Group, CudaLane]) -> None:
    """In the order of the spec, which is that of every rank."""
    stream, pool = torch.cuda.Stream(parts.device), torch.cuda.graph_pool_handle()
    shapes = graph_shapes(parts.spec)
    for group, lane in lanes.items():
        for shape in reversed(shapes):
            parts.memory.barrier(group)
            lane.capture(shape, stream, pool)


def graph_shapes(spec: WorkerSpec) -> list[StepShape]:
    """What a lane has graphs for, the smallest first."""
    chunks = chunk_shapes(spec.max_num_seqs, spec.max_batch_tokens)
    return sorted([*decode_shapes(spec.max_num_seqs), *chunks])


def _map_hosts(parts: Parts, shared: HostShared) -> list[torch.Tensor]:
    """Unit rows of every rank's host memory, pinned; the own one first, as pinning touches it."""
    spec = parts.spec
    if not spec.num_host_units:
        return []
    sizes = (parts.geometry, spec.num_host_units, spec.block_tokens, parts.dtype)
    rows = [Arena(region, *sizes).unit_rows() for region in shared.hosts]
    pin(rows[spec.rank])
    parts.memory.barrier()
    for rank, peer in enumerate(rows):
        if rank != spec.rank:
            pin(peer)
    return rows


def _mover(
    parts: Parts, arenas: Shared, num_units: int, signals: Signals, hosts: list[torch.Tensor]
) -> CudaMover:
    """A mover whose kernels are loaded."""
    spec = parts.spec
    unit_rows = tuple(_arena(parts, peer, num_units).unit_rows() for peer in arenas.peers)
    host = HostUnits(spec.rank, unit_rows[spec.rank], hosts)
    rows = RowPuller(parts.rows)
    mover = CudaMover(spec.rank, arenas, unit_rows, rows, signals, host, spec.fault)
    mover.warm_up()
    return mover


def _runner(
    parts: Parts,
    lanes: dict[Group, CudaLane],
    mover: CudaMover,
    signals: Signals,
    progress: Progress,
) -> CudaRunner:
    spec, geometry = parts.spec, parts.geometry
    per_page = {group: geometry.units_per_page(group.degree) for group in lanes}
    return CudaRunner(
        spec.rank,
        lanes,
        parts.state,
        parts.sampler,
        parts.grammars,
        mover,
        signals,
        progress,
        per_page,
    )


def _memory_bytes(parts: Parts, clock: Clock) -> dict[str, int]:
    """By what it is for, on the device but for `host_kv`; `largest_step` is what that of any lane
    needs at its peak."""
    spec = parts.spec
    unit_bytes = parts.geometry.unit_bytes(spec.block_tokens, DTYPE_BYTES[spec.dtype])
    return {
        "weights": parts.weights.num_bytes,
        "kv": clock.bytes["arena"],
        "host_kv": spec.num_host_units * unit_bytes,
        "graphs": clock.bytes["capture"],
        "groups_and_buffers": clock.bytes["map"],
        "largest_step": clock.bytes["warm_up"],
    }
