"""Kernels on a GPU at the sizes of real models, in bfloat16, and inside CUDA graphs."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from nitsum.errors import MissingDependency
from nitsum.kernels.attention import AttentionBackend, Sequences
from nitsum.kernels.flash3_attention import Flash3Attention
from nitsum.kernels.flashinfer_attention import FlashInferAttention
from nitsum.request import SamplingParams
from tests.unit.kernels import checks, sampling_checks
from tests.unit.kernels.kit import DEVICE, Step, make_step

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
LLAMA = [(8, 4, 128), (4, 4, 128)]  # 8B at TP 1 and TP 2
SMOL = (3, 3, 64)
DECODE = [(1023, 1), (16, 1), (0, 1), (4095, 1), (2047, 1), (15, 1)]
MIXED = [(1023, 1), (0, 1500), (700, 333), (5, 1), (16, 64), (3000, 2)]


@pytest.mark.parametrize(("n", "size"), [(1, 4096), (300, 4096), (5, 576), (3, 14336)])
def test_norms(n: int, size: int) -> None:
    checks.check_norms(n, size, BF16, seed=n)


@pytest.mark.parametrize(("chunks", "width"), [(2, 7168), (1, 7168), (4, 384)])
def test_silu_mul(chunks: int, width: int) -> None:
    checks.check_silu_mul(77, chunks, width, BF16, seed=width)


@pytest.mark.parametrize("heads", [*LLAMA, SMOL, (2, 7, 128)])
@pytest.mark.parametrize("n", [9, 700])
def test_qkv_rope_write(heads: tuple, n: int) -> None:
    checks.check_qkv_rope(heads, n, BF16, n, splits=False, biased=False, normed=False,
                          block_tokens=16)  # fmt: skip
    checks.check_qkv_rope(heads, n, BF16, n, splits=True, biased=True, normed=True, block_tokens=16)


def test_prepare() -> None:
    decodes = [(1 + 37 * i % 900, 1, True) for i in range(100)]
    checks.check_prepare(decodes, 28, 16, 1, decode=True, num_slots=130, row_tokens=1024)
    chunks = [(50, 1, True), (0, 600, False), (16, 900, True), (3, 2, True)]
    checks.check_prepare(decodes[:60] + chunks, 5, 16, 1, decode=False, num_slots=80,
                         row_tokens=1024)  # fmt: skip


@pytest.mark.parametrize("heads", [*LLAMA, SMOL, (1, 8, 128)])
@pytest.mark.parametrize("parts", [DECODE, MIXED], ids=["decode", "mixed"])
def test_triton_attention(heads: tuple, parts: list) -> None:
    checks.check_triton_attention(parts, heads, 16, BF16, 3, num_padding=2)


def flash3(step: Step) -> AttentionBackend:
    _, num_kv, g, d = step.q.shape
    longest = max(step.lengths.num_tokens)
    return Flash3Attention(
        num_kv, g, d, 16, BF16, max_query_tokens=longest, max_context=max(step.lengths.contexts)
    )


@pytest.mark.parametrize("heads", LLAMA)
@pytest.mark.parametrize(
    ("parts", "tensor_cores"), [(DECODE, False), (DECODE, True), (MIXED, True)]
)
def test_flashinfer(heads: tuple, parts: list, tensor_cores: bool) -> None:
    pytest.importorskip("flashinfer")
    step = make_step(parts, heads, 16, BF16, seed=4)
    backend = FlashInferAttention(
        step.sequences.num_seqs, len(step.q), 512, *heads, 16, BF16, DEVICE,
        decode_only=parts is DECODE, tensor_cores=tensor_cores,
    )  # fmt: skip
    checks.check_attention(backend, step)


@pytest.mark.parametrize("heads", [*LLAMA, SMOL])
@pytest.mark.parametrize("parts", [DECODE, MIXED], ids=["decode", "mixed"])
def test_flash3(heads: tuple, parts: list) -> None:
    step = make_step(parts, heads, 16, BF16, 4, num_padding=2)
    try:
        backend = flash3(step)
    except MissingDependency as missing:
        pytest.skip(str(missing))
    checks.check_attention(backend, step)


def test_one_graph_serves_any_lengths() -> None:
    """Captured with one step's lengths, replayed with another's in the same buffers."""
    longer = [(start + 500, 1) for start, _ in DECODE]
    first = make_step(DECODE, (8, 4, 128), 16, BF16, seed=1)
    second = make_step(longer, (8, 4, 128), 16, BF16, seed=2)
    backend = checks.triton_backend(second, decode_only=True)
    q, out = torch.zeros_like(second.q), torch.zeros_like(second.q)
    keys, values = torch.zeros_like(second.keys), torch.zeros_like(second.values)
    s = second.sequences
    sequences = Sequences(s.query_starts, s.contexts.clone(), s.page_table.clone())
    backend.plan(sequences)
    backend.run(q, keys, values, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.plan(sequences)
        backend.run(q, keys, values, out)
    for step in (first, second):
        width = step.sequences.page_table.shape[1]
        sequences.page_table[:, :width] = step.sequences.page_table
        sequences.contexts.copy_(step.sequences.contexts)
        q.copy_(step.q)
        keys[: len(step.keys)] = step.keys
        values[: len(step.values)] = step.values
        graph.replay()
        checks.check_attention(Replayed(out), step)


class Replayed:
    """A backend that has already run."""

    plans_on_host = False

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def plan(self, *_: object) -> None:
        pass

    def run(self, q: object, keys: object, values: object, out: torch.Tensor) -> None:
        out.copy_(self._result)


def test_sampling() -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.7, top_k=50, top_p=0.9, seed=4, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, min_p=0.1, seed=5, presence_penalty=0.5),
        SamplingParams(temperature=0.6, top_p=0.95, seed=6, logit_bias={7: 3.0, 11: -100.0}),
    ]
    sampling_checks.check_sampling(kinds * 3, 128256, seed=1)
    sampling_checks.check_greedy(9, 128256, seed=1)


def test_masks() -> None:
    sampling_checks.check_mask(9, 128256, [8, 0, 3], seed=1)


@pytest.mark.parametrize("wanted", [{"top_k": 50}, {"top_p": 0.95}, {"top_k": 500, "top_p": 0.5}])
def test_floors(wanted: dict) -> None:
    logits = (torch.randn(4, 128256, device=DEVICE) * 3).bfloat16().float()
    sampling_checks.check_floor(logits, SamplingParams(temperature=0.8, **wanted))


@pytest.mark.parametrize("row_elements", [2048, 8 * 2048])
def test_gather(row_elements: int) -> None:
    checks.check_gather(2, 32, row_elements, 90, range(32), num_programs=16, seed=1)
    checks.check_gather(2, 32, row_elements, 9, range(4, 7), num_programs=3, seed=1)
