"""Times by replayed CUDA graphs, beside the floors of this device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

DEVICE = "cuda"
BF16 = torch.bfloat16
BLOCK_TOKENS = 16
BEYOND_L2_BYTES = 256 << 20
TP1, TP2, SMALL = (8, 4, 128), (4, 4, 128), (3, 3, 64)
"""KV heads, query heads of each, and their size."""

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
