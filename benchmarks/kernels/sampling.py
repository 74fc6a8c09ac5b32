"""Drawing tokens, and moving units of KV."""

from __future__ import annotations

import torch

from benchmarks.kernels.timing import DEVICE, Report, ints, num_sets_for, randn
from nitsum.kernels import draw as drawing
from nitsum.kernels import sampling_table as tables
from nitsum.kernels.gather import gather_units
from nitsum.kernels.shape_logits import shape_logits
from nitsum.messages import Join
from nitsum.request import SamplingParams


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
