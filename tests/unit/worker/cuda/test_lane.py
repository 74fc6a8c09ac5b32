"""A GPU lane's eager path against `transformers`: state, packing, kernels, sampler together.

Runs in Triton's interpreter where there is no GPU. Graphs need one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nitsum.kernels.prepare import StepTensors
from nitsum.kernels.triton_attention import TritonAttention
from nitsum.messages import Join, Pages, Step, Work
from nitsum.model.cuda_ops import rope_table
from nitsum.model.ops import Heads
from nitsum.plan import Group
from nitsum.request import SamplingParams
from nitsum.shape import Geometry, ModelShape
from nitsum.worker.arena import Arena
from nitsum.worker.cuda.comm import CommSizes, CudaComm
from nitsum.worker.cuda.lane import CudaLane
from nitsum.worker.cuda.packing import pack
from nitsum.worker.cuda.sampling import (
    FILTERED,
    GREEDY,
    RANDOM,
    DeviceSampler,
    captured_needs,
    read_logits,
    read_logprobs,
)
from nitsum.worker.cuda.state import DeviceState
from nitsum.worker.cuda.symmetric import SymmetricMemory
from nitsum.worker.weights import load_weights, open_source
from tests.checkpoints import write_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALONE = Group(1, 0)
PROMPT = [5, 77, 130, 8, 199, 42, 17]
SLOT, PAGES = 2, [3, 9, 1]
MAX_SEQS, MAX_TOKENS, ROW_TOKENS, BLOCK_TOKENS = 4, 16, 40, 4


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
        units = 16 * geometry.num_units
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
        """Logits of the step, whose tokens are in the rows afterwards."""
        self.sampler.join(joins)
        shape = self.lane.shape_for(work)
        message = Step(1, 1, ALONE, joins, pages, work)
        self.state.take_in(pack(message, 0, shape.num_seqs, self.state.max_pages))
        logits, draws = self.lane.compute(shape, work)
        if len(logits):
            needs = self.sampler.needs(work)
            self.sampler.draw(logits, draws, needs, self.lane.comm, ROW_TOKENS)
        return logits.cpu()

    def row(self, num_tokens: int) -> list[int]:
        return self.state.rows[SLOT, :num_tokens].tolist()


def test_a_sequence_in_chunks_and_steps(tmp_path: Path):
    model = write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    rank = Rank(tmp_path)
    sampling = SamplingParams(temperature=0.0, logprobs=2, return_logits=True)
    join = Join(SLOT, [*PROMPT, 0, 11], len(PROMPT), len(PROMPT) + 2, sampling)
    nothing = rank.step([Work(SLOT, 0, 4, False)], [join], [Pages(SLOT, 0, [PAGES])])
    assert nothing.shape[0] == 0
    first = rank.step([Work(SLOT, 4, 3, True)], [], [])
    rest = [rank.step([Work(SLOT, 7 + i, 1, True)], [], []) for i in range(2)]
    row = rank.row(10)
    assert row[:9] == [*PROMPT, 0, 11]  # given tokens stay, whatever is drawn
    with torch.no_grad():
        expected = model(torch.tensor([row[:9]])).logits[0, 6:]
    logits = torch.cat([first, *rest])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert row[9] == int(expected[-1].argmax())
    reports = rank.sampler.reports([Work(SLOT, 8, 1, True)], rest[-1].to(DEVICE))
    (logprobs,) = read_logprobs(reports, 1)
    assert logprobs is not None
    assert logprobs.top_ids[0] == row[9]
    assert logprobs.logprob == pytest.approx(float(expected[-1].log_softmax(-1)[row[9]]), abs=1e-4)
    (raw,) = read_logits(reports, 1)
    assert raw == rest[-1].numpy().tobytes()


def test_a_batch_draws_by_the_most_demanding_graph_it_needs():
    cases = [
        (SamplingParams(temperature=0.0), GREEDY),
        (SamplingParams(), RANDOM),
        (SamplingParams(top_p=0.9), FILTERED),
        (SamplingParams(top_k=5), FILTERED),
    ]
    sampler = DeviceSampler(torch.zeros(8, 8, dtype=torch.int32, device=DEVICE), 4, 16)
    for slot, (sampling, captured) in enumerate(cases):
        sampler.join([Join(slot, [1], 1, 1, sampling)])
        assert captured_needs(sampler.needs([Work(slot, 0, 1, True)])) == captured
    assert captured_needs(sampler.needs([Work(i, 0, 1, True) for i in range(2)])) == RANDOM
    assert captured_needs(sampler.needs([Work(i, 0, 1, True) for i in range(4)])) == FILTERED
    sampler.join([Join(5, [1], 1, 1, SamplingParams(frequency_penalty=0.5))])
    assert captured_needs(sampler.needs([Work(5, 0, 1, True)])) is None
    assert captured_needs(sampler.needs([Work(5, 0, 1, False)])) == GREEDY
