"""Times every kernel against the bytes or operations it cannot avoid; needs one CUDA device.

    python benchmarks/kernels.py --out DIR [--only decode,chunk] [--warm]

Times are medians of replayed CUDA graphs over rotating inputs, too many for the L2 cache to hold.
Floors use the copy and matmul rates measured in the same run. Writes DIR/summary.json. `--warm`
compiles and runs everything once, without timing: several such processes compile in parallel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import torch

from nitsum.errors import MissingDependency
from nitsum.kernels import chunk_attention as chunk
from nitsum.kernels import decode_attention as decode
from nitsum.kernels import draw as drawing
from nitsum.kernels import sampling_table as tables
from nitsum.kernels.activation import silu_mul
from nitsum.kernels.attention import AttentionBackend, HostLengths, Sequences
from nitsum.kernels.flash3_attention import Flash3Attention
from nitsum.kernels.flashinfer_attention import FlashInferAttention
from nitsum.kernels.gather import gather_units
from nitsum.kernels.norm import add_rms_norm
from nitsum.kernels.prepare import StepTensors, prepare, record
from nitsum.kernels.qkv_rope import qkv_rope_write, split_heads
from nitsum.kernels.shape_logits import shape_logits
from nitsum.kernels.triton_attention import TritonAttention
from nitsum.messages import Join
from nitsum.model.cuda_ops import rope_table
from nitsum.request import SamplingParams
from nitsum.shape import RopeScaling

DEVICE = "cuda"
BF16 = torch.bfloat16
BLOCK_TOKENS = 16
BEYOND_L2_BYTES = 256 << 20
TP1, TP2, SMALL = (8, 4, 128), (4, 4, 128), (3, 3, 64)

Run = Callable[[int], object]
"""Does the work once, on input set i."""


@dataclass
class Report:
    """Collects figures, and prints each as it comes."""

    warm: bool
    copy_rate: float = 4.3e12
    matmul_rate: float = 790e12
    figures: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, run: Run, num_sets: int, floor_s: float = 0.0) -> None:
        try:
            seconds = graph_seconds(run, num_sets, self.warm)
        except Exception as error:  # one variant that fails must not cost the others their figures
            print(f"{name:58s} {type(error).__name__}: {str(error)[:150]}", flush=True)
            return
        if not self.warm:
            self.add(f"{name}_us", seconds * 1e6, floor_s * 1e6)

    def add(self, name: str, value: float, floor: float = 0.0) -> None:
        self.figures[name] = round(value, 3)
        if floor:
            self.figures[f"{name}_floor"] = round(floor, 3)
        share = f"floor {floor:9.2f}  {floor / value:5.0%}" if floor else ""
        print(f"{name:58s} {value:10.2f}  {share}", flush=True)

    def bytes_floor(self, num_bytes: float) -> float:
        return num_bytes / self.copy_rate


def graph_seconds(run: Run, num_sets: int, warm: bool, min_calls: int = 8) -> float:
    """Median seconds of one call, from replays of a graph of several calls."""
    for i in range(1 if warm else min(num_sets, 2)):
        run(i)
    torch.cuda.synchronize()
    if warm:
        return 0.0
    calls = max(num_sets, min_calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % num_sets)
    graph.replay()
    return statistics.median(replay_seconds(graph) for _ in range(9)) / calls


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def num_sets_for(num_bytes: float) -> int:
    """Input sets that together do not fit the L2 cache."""
    return int(min(64, max(2, BEYOND_L2_BYTES // max(1, num_bytes))))


def randn(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(size, dtype=dtype, device=DEVICE)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# --- ceilings ------------------------------------------------------------------------------------


def measure_ceilings(report: Report) -> None:
    # By a kernel: a captured copy_() becomes a copy by the engine, at 2.8 TB/s on an H200.
    src = randn(1 << 29, dtype=torch.float32)
    dst = torch.empty_like(src)
    seconds = graph_seconds(lambda _: torch.mul(src, 1.0, out=dst), 1, False, 3)
    report.copy_rate = 2 * src.numel() * 4 / seconds
    a, b = randn(8192, 8192), randn(8192, 8192)
    report.matmul_rate = 2 * 8192**3 / graph_seconds(lambda _: a @ b, 1, False, 5)
    report.add("copy_tb_per_s", report.copy_rate / 1e12)
    report.add("matmul_tflop_per_s", report.matmul_rate / 1e12)


# --- layer kernels -------------------------------------------------------------------------------


def bench_layer(report: Report) -> None:
    for n in (1, 64, 256, 2048):
        bench_norm(report, n)
        bench_silu(report, n)
        bench_rope(report, n, TP1)


def bench_norm(report: Report, n: int, size: int = 4096) -> None:
    moved = 4 * n * size * 2
    sets = [(randn(n, size), randn(n, size), randn(n, size)) for _ in range(num_sets_for(moved))]
    weight = randn(size)
    report.time(
        f"add_rms_norm_n{n}",
        lambda i: add_rms_norm(sets[i][0], sets[i][1], weight, 1e-5, sets[i][2]),
        len(sets),
        report.bytes_floor(moved),
    )


def bench_silu(report: Report, n: int, width: int = 7168) -> None:
    moved = 3 * n * 2 * width * 2
    sets = [(randn(n, 4 * width), randn(n, 2 * width)) for _ in range(num_sets_for(moved))]
    report.time(
        f"silu_mul_n{n}",
        lambda i: silu_mul(sets[i][0], 2, sets[i][1]),
        len(sets),
        report.bytes_floor(moved),
    )


def bench_rope(report: Report, n: int, heads: tuple[int, int, int]) -> None:
    num_kv, g, d = heads
    moved = 2 * n * num_kv * (g + 2) * d * 2
    num_sets = num_sets_for(moved)
    rows = [randn(n, num_kv * (g + 2) * d) for _ in range(num_sets)]
    outs = [randn(n, num_kv, g, d) for _ in range(num_sets)]
    pages = randn(2, num_sets, n, num_kv, BLOCK_TOKENS, d)
    table = rope_table(RopeScaling(theta=5e5), d, 8192, BF16, DEVICE)
    positions = torch.randint(0, 8192, (n,), device=DEVICE)
    slots = torch.randperm(n * BLOCK_TOKENS, device=DEVICE)[:n]
    report.time(
        f"qkv_rope_write_n{n}",
        lambda i: qkv_rope_write(
            *split_heads(rows[i], None, *heads), table, positions, slots,
            pages[0, i], pages[1, i], out=outs[i],
        ),
        num_sets,
        report.bytes_floor(moved),
    )  # fmt: skip


def bench_prepare(report: Report) -> None:
    for num_seqs, chunk_tokens in ((1, 0), (64, 0), (256, 0), (64, 2048), (3, 8192)):
        slots, max_pages = 1024, 512
        rows = torch.randint(0, 1000, (slots, 8192 + 2), dtype=torch.int32, device=DEVICE)
        pages = torch.randint(0, 9999, (slots, max_pages), dtype=torch.int32, device=DEVICE)
        counts = [1] * num_seqs
        if chunk_tokens:
            counts[-1] = chunk_tokens - num_seqs + 1
        lines = [[i, 1000 if n == 1 else 0, n, 1] for i, n in enumerate(counts)]
        work = torch.tensor(lines, dtype=torch.int32, device=DEVICE)
        out = StepTensors.empty(sum(counts), num_seqs, max_pages, DEVICE)
        drawn = torch.zeros(num_seqs, dtype=torch.int32, device=DEVICE)
        name = f"s{num_seqs}_n{sum(counts)}"
        report.time(
            f"prepare_{name}",
            lambda _, a=(rows, pages, work, 16, out), d=not chunk_tokens: prepare(*a, decode=d),
            1,
        )
        known = torch.zeros(slots, dtype=torch.int32, device=DEVICE)
        where = (rows, known, out.sample_slots, out.sample_positions, drawn)
        report.time(f"record_{name}", lambda _, a=where: record(*a), 1)


# --- attention -----------------------------------------------------------------------------------


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


# --- sampling and moves --------------------------------------------------------------------------


def bench_sampling(report: Report, vocab: int = 128256) -> None:
    kinds = {
        "greedy": SamplingParams(temperature=0.0),
        "temperature": SamplingParams(),
        "top_p": SamplingParams(top_p=0.95),
        "top_k_top_p": SamplingParams(top_k=50, top_p=0.95),
    }
    for m in (1, 8, 64, 256):
        moved = m * vocab * 4
        sets = [
            randn(m, vocab, dtype=torch.float32) * 4 for _ in range(min(8, num_sets_for(moved)))
        ]
        for name, kind in kinds.items():
            bench_draw(report, f"draw_{name}_m{m}", kind, sets)
        report.time(
            f"torch_argmax_m{m}", lambda i, s=sets: s[i].argmax(-1), len(sets),
            report.bytes_floor(moved),
        )  # fmt: skip
        bench_penalties(report, m, sets)


def sampling_table(kind: SamplingParams, num_prompt: int, m: int) -> torch.Tensor:
    """[m, LINE_INTS] int32, all lines alike."""
    lines = tables.sampling_lines([Join(i, [], num_prompt, num_prompt, kind) for i in range(m)])
    return torch.from_numpy(lines).to(DEVICE)


def bench_draw(report: Report, name: str, kind: SamplingParams, sets: list[torch.Tensor]) -> None:
    m, vocab = sets[0].shape
    table = sampling_table(kind, 10, m)
    slots, positions = ints([*range(m)]), ints([1000 + i for i in range(m)])
    buffers, needs = drawing.draw_buffers(m, vocab, DEVICE), tables.sampling_needs(kind)
    out = torch.zeros(m, dtype=torch.int32, device=DEVICE)
    report.time(
        name,
        lambda i: drawing.draw(sets[i], table, slots, positions, needs, buffers, out),
        len(sets),
        report.bytes_floor(m * vocab * 4),
    )


def bench_penalties(report: Report, m: int, sets: list[torch.Tensor]) -> None:
    vocab = sets[0].shape[1]
    kind = SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, logit_bias={5: 1.0})
    table = sampling_table(kind, 900, m)
    slots, positions = ints([*range(m)]), ints([1024] * m)
    rows = torch.randint(0, vocab, (m, 8192), dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(m, vocab, dtype=torch.int32, device=DEVICE)
    report.time(
        f"shape_logits_m{m}_c1024",
        lambda i: shape_logits(sets[i], rows, table, slots, positions, counts, 2048),
        len(sets),
    )


def bench_gather(report: Report, total_bytes: int = 256 << 20, num_layers: int = 32) -> None:
    """Inside one device: what the kernel can do when no link bounds it."""
    for row_bytes in (4096, 32768):
        num_moves = total_bytes // (2 * num_layers * row_bytes)
        arena = randn(2 * num_layers, 2 * num_moves, row_bytes // 2)
        staging = torch.empty_like(arena)
        src, dst = (torch.randperm(2 * num_moves)[:num_moves] for _ in range(2))
        moves = torch.stack((torch.zeros_like(src), src, dst), 1).int().to(DEVICE)
        bases = torch.tensor([arena.data_ptr()], device=DEVICE)
        units = torch.tensor([2 * num_moves], device=DEVICE)
        count = ints([num_moves])
        for programs in (8, 16, 32, 64, 132, 528):
            report.time(
                f"gather_256mib_rows{row_bytes}_p{programs}",
                lambda _, p=programs, a=(bases, units, moves, count, staging): gather_units(
                    *a, layers=range(num_layers), num_programs=p
                ),
                1,
                report.bytes_floor(2 * total_bytes),
            )


SECTIONS: dict[str, Callable[[Report], None]] = {
    "layer": bench_layer,
    "prepare": bench_prepare,
    "sampling": bench_sampling,
    "gather": bench_gather,
    "chunk": bench_chunk,
    "decode": bench_decode,
}


def summary(report: Report) -> dict[str, object]:
    import triton

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "triton": triton.__version__,
                     "cuda": torch.version.cuda},
        "hardware": torch.cuda.get_device_name(),
        "notes": "Medians of replayed CUDA graphs; floors from rates measured in the same run.",
        "figures": report.figures,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.warm)
    if not arguments.warm:
        measure_ceilings(report)
    for name in arguments.only.split(","):
        SECTIONS[name](report)
        torch.cuda.empty_cache()
        if arguments.out and not arguments.warm:
            arguments.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(summary(report), indent=1)
            (arguments.out / "summary.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
