"""Kernels between GEMMs, and those that prepare a step."""

from __future__ import annotations

import torch

from benchmarks.kernels.timing import BF16, BLOCK_TOKENS, DEVICE, TP1, Report, num_sets_for, randn
from nitsum.kernels.activation import silu_mul
from nitsum.kernels.norm import add_rms_norm
from nitsum.kernels.prepare import StepTensors, prepare, record
from nitsum.kernels.qkv_rope import qkv_rope_write, split_heads
from nitsum.model.cuda_ops import rope_table
from nitsum.shape import RopeScaling


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
