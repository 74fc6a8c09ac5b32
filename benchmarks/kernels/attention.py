"""Attention of decodes and of prompts, by every backend there is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from benchmarks.kernels.timing import (
    BF16,
    BLOCK_TOKENS,
    DEVICE,
    SMALL,
    TP1,
    TP2,
    Report,
    ints,
    num_sets_for,
    randn,
)
from nitsum.errors import MissingDependency
from nitsum.kernels import chunk_attention as chunk
from nitsum.kernels import decode_attention as decode
from nitsum.kernels.attention import AttentionBackend, HostLengths, Sequences
from nitsum.kernels.flash3_attention import Flash3Attention
from nitsum.kernels.flashinfer_attention import FlashInferAttention
from nitsum.kernels.triton_attention import TritonAttention


@dataclass
class AttentionCase:
    """One step's sequences over as many layers as outgrow the L2 cache."""

    name: str
    heads: tuple[int, int, int]
    parts: list[tuple[int, int]]  # (start, num_tokens)

    def __post_init__(self) -> None:
        num_kv, g, d = self.heads
        contexts = [start + n for start, n in self.parts]
        counts = [n for _, n in self.parts]
        blocks = [-(-context // BLOCK_TOKENS) for context in contexts]
        self.kv_bytes = 2 * sum(contexts) * num_kv * d * 2
        self.num_layers = num_sets_for(self.kv_bytes)
        num_pages = sum(blocks)
        self.keys, self.values = (
            randn(self.num_layers, num_pages, num_kv, BLOCK_TOKENS, d) for _ in range(2)
        )
        self.q = randn(sum(counts), num_kv, g, d)
        self.outs = torch.empty_like(self.q)
        table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        free = torch.randperm(num_pages, dtype=torch.int32)
        for line, (end, count) in enumerate(zip(accumulate(blocks), blocks, strict=True)):
            table[line, :count] = free[end - count : end]
        starts = [0, *accumulate(counts)]
        self.sequences = Sequences(ints(starts), ints(contexts), table.to(DEVICE))
        self.lengths = HostLengths(counts, contexts)

    @property
    def decode_only(self) -> bool:
        return all(n == 1 for _, n in self.parts)

    def floor_s(self, report: Report) -> float:
        """Bytes of KV, q and out, or the operations of causal attention, whichever is longer."""
        num_kv, g, d = self.heads
        seen = sum(n * start + n * (n + 1) // 2 for start, n in self.parts)
        flops = 4 * seen * num_kv * g * d
        moved = self.kv_bytes + 2 * self.q.numel() * 2
        return max(report.bytes_floor(moved), flops / report.matmul_rate)

    def run(self, backend: AttentionBackend, i: int) -> None:
        backend.run(self.q, self.keys[i], self.values[i], self.outs)


def decode_cases() -> Iterator[AttentionCase]:
    for batch in (1, 8, 64, 256):
        yield AttentionCase(f"b{batch}_c1024", TP1, [(1023, 1)] * batch)
    yield AttentionCase("b8_c8192", TP1, [(8191, 1)] * 8)
    yield AttentionCase("b64_skewed", TP1, [(8191, 1)] + [(511, 1)] * 63)
    for batch in (1, 64):
        yield AttentionCase(f"tp2_b{batch}_c1024", TP2, [(1023, 1)] * batch)
    yield AttentionCase("d64_b32_c1024", SMALL, [(1023, 1)] * 32)


def chunk_cases() -> Iterator[AttentionCase]:
    yield AttentionCase("n2048", TP1, [(0, 2048)])
    yield AttentionCase("n8192", TP1, [(0, 8192)])
    yield AttentionCase("n512_after_4096", TP1, [(4096, 512)])
    yield AttentionCase("tp2_n2048", TP2, [(0, 2048)])
    yield AttentionCase("mixed_64_decodes_n512", TP1, [(1023, 1)] * 64 + [(1024, 512)])


DECODE_TUNINGS = {
    "n128w4s3_p2": decode.Tuning(programs_per_sm=2),
    "n128w4s3_p3": decode.Tuning(programs_per_sm=3),
    "n128w4s3_p4": decode.Tuning(programs_per_sm=4),
    "n128w4s3_p6": decode.Tuning(programs_per_sm=6),
    "n64w4s3_p6": decode.Tuning(64, 4, 3, 6),
}
CHUNK_TUNINGS = {
    "m128n128w8s3": chunk.Tuning(),
    "m128n128w8s2": chunk.Tuning(128, 128, 8, 2),
    "m64n64w4s3": chunk.Tuning(64, 64, 4, 3),
}

Maker = Callable[[AttentionCase], AttentionBackend]


def triton_maker(
    decode_tuning: decode.Tuning | None = None, chunk_tuning: chunk.Tuning | None = None
) -> Maker:
    def make(case: AttentionCase) -> AttentionBackend:
        return TritonAttention(
            len(case.parts), *case.heads, DEVICE, decode_only=case.decode_only,
            side=torch.cuda.Stream(), decode_tuning=decode_tuning, chunk_tuning=chunk_tuning,
        )  # fmt: skip

    return make


def flashinfer_maker(tensor_cores: bool = True) -> Maker:
    def make(case: AttentionCase) -> AttentionBackend:
        max_pages = case.sequences.page_table.shape[1]
        return FlashInferAttention(
            len(case.parts), len(case.q), max_pages, *case.heads, BLOCK_TOKENS, BF16, DEVICE,
            decode_only=case.decode_only, tensor_cores=tensor_cores,
        )  # fmt: skip

    return make


def flash3(case: AttentionCase) -> AttentionBackend:
    return Flash3Attention(
        *case.heads, BLOCK_TOKENS, BF16,
        max_query_tokens=max(case.lengths.num_tokens), max_context=max(case.lengths.contexts),
    )  # fmt: skip


def bench_decode(report: Report) -> None:
    makers = {f"triton_{name}": triton_maker(t) for name, t in DECODE_TUNINGS.items()}
    makers["fa3"] = flash3
    for case in decode_cases():
        bench_attention(report, f"decode_{case.name}", case, makers)
        if case.heads[2] == 128:
            bench_attention(report, f"decode_{case.name}", case, flashinfer_decoders())


def flashinfer_decoders() -> dict[str, Maker]:
    return {"flashinfer_tc": flashinfer_maker(True), "flashinfer_cc": flashinfer_maker(False)}


def bench_chunk(report: Report) -> None:
    makers = {f"triton_{name}": triton_maker(None, t) for name, t in CHUNK_TUNINGS.items()}
    makers |= {"flashinfer_fa2": flashinfer_maker(), "fa3": flash3}
    for case in chunk_cases():
        bench_attention(report, f"chunk_{case.name}", case, makers)


def bench_attention(
    report: Report, name: str, case: AttentionCase, makers: dict[str, Maker]
) -> None:
    expected = None
    for variant, make in makers.items():
        try:
            backend = make(case)
            backend.plan(case.sequences, case.lengths)
            case.outs.fill_(float("nan"))
            case.run(backend, 0)
        except MissingDependency:
            continue
        except Exception as error:  # a variant may not fit this device
            print(f"{name}_{variant}: {type(error).__name__}: {str(error)[:150]}", flush=True)
            continue
        ours = case.outs.float()
        expected = ours.clone() if expected is None else expected
        error = float((ours - expected).norm() / expected.norm())
        if not error < 1e-2:
            print(f"{name}_{variant}: WRONG, relative error {error:.2e}", flush=True)
            continue
        report.time(
            f"{name}_{variant}", lambda i, b=backend: case.run(b, i), case.num_layers,
            case.floor_s(report),
        )  # fmt: skip
        time_plan(report, f"{name}_{variant}_plan", backend, case)


def time_plan(report: Report, name: str, backend: AttentionBackend, case: AttentionCase) -> None:
    """Host time of plan(), kernels it launches not waited for."""
    if report.warm or case.name not in ("b64_c1024", "b256_c1024", "mixed_64_decodes_n512"):
        return
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        backend.plan(case.sequences, case.lengths)
        seconds.append(time.perf_counter() - started_s)
    report.add(f"{name}_host_us", statistics.median(seconds) * 1e6)
