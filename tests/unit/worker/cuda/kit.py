"""A GPU rank in this process, without graphs: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from nitsum.kernels.prepare import StepTensors
from nitsum.kernels.triton_attention import TritonAttention
from nitsum.messages import Join, Pages, Step, Work
from nitsum.model.cuda_ops import rope_table
from nitsum.model.ops import Heads
from nitsum.plan import Group
from nitsum.shape import Geometry, ModelShape
from nitsum.worker.arena import Arena
from nitsum.worker.cuda.comm import CommSizes, CudaComm
from nitsum.worker.cuda.grammar import DeviceGrammars
from nitsum.worker.cuda.lane import CudaLane
from nitsum.worker.cuda.packing import pack
from nitsum.worker.cuda.sampling import DeviceSampler, Reports
from nitsum.worker.cuda.state import DeviceState
from nitsum.worker.cuda.symmetric import SymmetricMemory
from nitsum.worker.grammar import GrammarMasks
from nitsum.worker.weights import load_weights, open_source

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALONE = Group(1, 0)
SLOT = 2
MAX_SEQS, MAX_TOKENS, ROW_TOKENS, BLOCK_TOKENS = 4, 16, 100, 4


class Rank:
    """One rank, one lane, no graphs."""

    def __init__(self, folder: Path) -> None:
        shape = ModelShape.from_folder(folder)
        geometry = Geometry(shape, max_tp=2)
        source = open_source(folder, shape, "auto")
        weights = load_weights(geometry, 0, source, dtype=torch.float32, device=DEVICE)
        memory = SymmetricMemory(0, 1, [ALONE], DEVICE, folder, 5.0)
        sizes = CommSizes(
            MAX_TOKENS, shape.hidden_size, MAX_SEQS, geometry.vocab_size, torch.float32
        )
        comm = CudaComm(ALONE, 0, memory, sizes)
        rows = memory.allocate((8, ROW_TOKENS), torch.int32, None)
        self.state = DeviceState(rows, BLOCK_TOKENS, MAX_SEQS)
        self.sampler = DeviceSampler(rows.own, MAX_SEQS, shape.vocab_size)
        self.reports: Reports | None = None
        """Of the last step that drew."""
        self.grammars = DeviceGrammars(rows.own, GrammarMasks(folder, 2), shape.vocab_size)
        units = 64 * geometry.num_units
        flat = torch.zeros(units * geometry.unit_bytes(BLOCK_TOKENS, 4) // 4, device=DEVICE)
        heads = Heads.of(geometry, 1, 0)
        self.lane = CudaLane(
            geometry,
            weights.views(1, 0),
            comm,
            Arena(flat, geometry, units, BLOCK_TOKENS).pages(1),
            self.state,
            StepTensors.empty(MAX_TOKENS, MAX_SEQS, self.state.max_pages, DEVICE),
            self.sampler,
            rope_table(shape.rope, shape.head_dim, ROW_TOKENS, torch.float32, DEVICE),
            lambda n, decode: TritonAttention(
                n, heads.num_kv, heads.q_per_kv, heads.head_dim, DEVICE, decode_only=decode
            ),
        )

    def step(self, work: list[Work], joins: list[Join], pages: list[Pages]) -> torch.Tensor:
        """Raw logits of the step, whose tokens are in the rows afterwards."""
        self.sampler.join(joins)
        self.grammars.join(joins)
        shape = self.lane.shape_for(work)
        message = Step(1, 1, ALONE, joins, pages, work)
        self.state.take_in(pack(message, 0, shape.num_seqs, self.state.max_pages))
        reading = self.grammars.read(work)
        logits, draws, hidden, rows = self.lane.compute(shape, work)
        raw = logits.clone()
        if len(logits):
            if reading is not None:
                self.synchronize()
                self.grammars.mask(logits, reading)
            needs = self.sampler.needs(work)
            self.sampler.draw(logits, draws, needs, self.lane.comm, ROW_TOKENS)
            self.reports = self.sampler.reports(work, raw, hidden, rows)
            self.synchronize()
        return raw.cpu()

    def row(self, num_tokens: int, slot: int = SLOT) -> list[int]:
        return self.state.rows[slot, :num_tokens].tolist()

    @staticmethod
    def synchronize() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
