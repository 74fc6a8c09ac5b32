"""First contact with a GPU: does each part run, and how far from the floor is it?

    python benchmarks/gpu_probe.py [--layers 32] [--out FOLDER]

One rank, in this process, Llama-3.1-8B shape, dummy bfloat16 weights. Prints a short table and
writes `probe.json`. Nothing stops at the first failure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    attempt(figures, "copy", lambda: copy_bandwidth(figures))
    rank = attempt(figures, "start", lambda: make_rank(figures, args.layers))
    if rank is not None:
        for tokens in (512, 1155, 2048, 4096):
            attempt(figures, f"prefill {tokens}", lambda n=tokens: prefill(figures, rank, n))
        attempt(figures, "fill", lambda: fill(figures, rank))
        for batch in (1, 8, 32, 64, 128, 256):
            attempt(figures, f"decode {batch}", lambda b=batch: decode(figures, rank, b))
        attempt(figures, "host", lambda: host_profile(rank))
        attempt(figures, "profile", lambda: profile(rank, args.out))
    (args.out / "probe.json").write_text(json.dumps(figures, indent=1))


def attempt(figures: dict[str, Any], name: str, call: Any) -> Any:
    started_s = time.monotonic()
    try:
        return call()
    except Exception:
        figures[f"{name} failed"] = traceback.format_exc()[-1500:]
        print(f"FAILED {name}\n{traceback.format_exc()[-1500:]}", flush=True)
        return None
    finally:
        print(f"[{name}: {time.monotonic() - started_s:.1f} s]", flush=True)


def note(figures: dict[str, Any], **values: float) -> None:
    figures.update(values)
    print("  ".join(f"{name}={value:.4g}" for name, value in values.items()), flush=True)


def copy_bandwidth(figures: dict[str, Any]) -> None:
    import torch

    a = torch.randn(1 << 30, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    note(figures, copy_tb_s=2 * a.nbytes / statistics.median(times) / 1e9)


class Rank:
    """A runner by hand: messages in, replies out."""

    def __init__(self, spec: Any, shared: Any) -> None:
        from nitsum.plan import Group
        from nitsum.worker.cuda.setup import start

        self.runner, self.ready = start(spec, shared)
        self.group = Group(1, 0)
        self.spec = spec
        self.step_id = 0
        self.host_s: list[float] = []

    def send(self, work: list[Any], joins: Any = (), pages: Any = ()) -> None:
        from nitsum.messages import Step

        self.step_id += 1
        step = Step(self.step_id, 1, self.group, list(joins), list(pages), work)
        started_s = time.perf_counter()
        self.runner.obey(step)
        self.host_s.append(time.perf_counter() - started_s)

    def wait(self, count: int) -> list[Any]:
        done: list[Any] = []
        while len(done) < count:
            done.extend(self.runner.finished())
        return done


def make_rank(figures: dict[str, Any], layers: int) -> Rank:
    from nitsum.messages import WorkerSpec
    from nitsum.plan import Group
    from nitsum.shape import Geometry, ModelShape
    from nitsum.shared import allocate

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
    spec = WorkerSpec(
        rank=0, num_ranks=1, device="cuda", model=str(folder), load_format="dummy",
        dtype="bfloat16", max_tp=1, groups=[Group(1, 0)], block_tokens=16, num_units=0,
        max_slots=1024, max_model_len=8192, max_batch_tokens=8192, max_num_seqs=256,
        num_threads=4, engine_address=f"ipc://{folder}/engine", inbox_address="",
    )  # fmt: skip
    rank = Rank(spec, allocate(spec, Geometry(ModelShape.from_folder(folder), 1)))
    for name, value in rank.ready.phases.items():
        note(figures, **{f"start_{name}_s": value})
    for name, value in rank.ready.memory_bytes.items():
        note(figures, **{f"memory_{name}_gib": value / 2**30})
    note(figures, num_units=rank.ready.num_units)
    return rank


def pages_of(slot: int, num_tokens: int) -> Any:
    from nitsum.messages import Pages

    per_slot = 8192 // 16
    first = slot * 80 if slot < 256 else 256 * 80 + (slot - 256) * per_slot
    return Pages(slot, 0, [list(range(first, first + -(-num_tokens // 16)))])


def join_of(slot: int, num_tokens: int) -> Any:
    import random

    from nitsum.messages import Join
    from nitsum.request import SamplingParams

    draw = random.Random(slot)
    tokens = [draw.randrange(100000) for _ in range(num_tokens)]
    return Join(slot, tokens, num_tokens, num_tokens, SamplingParams(temperature=0.0))


def prefill(figures: dict[str, Any], rank: Rank, num_tokens: int) -> None:
    from nitsum.messages import Work

    walls, seconds = [], []
    for i in range(8):
        started_s = time.perf_counter()
        slot = 256 + i
        rank.send(
            [Work(slot, 0, num_tokens, True)],
            [join_of(slot, num_tokens)],
            [pages_of(slot, num_tokens)],
        )
        done = rank.wait(1)[0]
        walls.append((time.perf_counter() - started_s) * 1e3)
        seconds.append(done.seconds * 1e3)
    note(
        figures,
        **{
            f"prefill_ms_tp1_{num_tokens}": statistics.median(seconds[2:]),
            f"prefill_wall_ms_tp1_{num_tokens}": statistics.median(walls[2:]),
            f"prefill_host_ms_tp1_{num_tokens}": 1e3 * statistics.median(rank.host_s[-6:]),
        },
    )


def fill(figures: dict[str, Any], rank: Rank) -> None:
    """256 sequences of `CONTEXT` tokens, eight a step."""
    from nitsum.messages import Work

    started_s = time.perf_counter()
    for first in range(0, 256, 8):
        slots = range(first, first + 8)
        rank.send(
            [Work(slot, 0, CONTEXT, True) for slot in slots],
            [join_of(slot, CONTEXT) for slot in slots],
            [pages_of(slot, CONTEXT + 200) for slot in slots],
        )
    rank.wait(32)
    note(figures, prefill_tokens_per_s=256 * CONTEXT / (time.perf_counter() - started_s))


def decode(figures: dict[str, Any], rank: Rank, batch: int) -> None:
    from nitsum.messages import Work

    gaps, seconds = [], []
    rank.host_s.clear()
    last_s = 0.0
    rank.send([Work(slot, CONTEXT, 1, True) for slot in range(batch)])
    for i in range(1, 40):
        rank.send([Work(slot, CONTEXT + i, 1, True) for slot in range(batch)])
        done = rank.wait(1)[0]
        now_s = time.perf_counter()
        gaps.append(1e3 * (now_s - last_s))
        seconds.append(1e3 * done.seconds)
        last_s = now_s
    rank.wait(1)
    note(
        figures,
        **{
            f"decode_gap_ms_tp1_b{batch}": statistics.median(gaps[8:]),
            f"decode_ms_tp1_b{batch}": statistics.median(seconds[8:]),
            f"host_ms_per_step_b{batch}": 1e3 * statistics.median(rank.host_s[8:]),
        },
    )


def profile(rank: Rank, out: Path) -> None:
    """Where a decode step of 64 and a prefill of 2,048 spend the device's time."""
    import torch
    from torch.profiler import ProfilerActivity

    from nitsum.messages import Work

    for batch in (1, 64):
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            rank.send([Work(slot, CONTEXT, 1, True) for slot in range(batch)])
            rank.wait(1)
            torch.cuda.synchronize()
        write(profiler, out / f"decode{batch}.txt")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        rank.send([Work(300, 0, 2048, True)], [join_of(300, 2048)], [pages_of(300, 2048)])
        rank.wait(1)
        torch.cuda.synchronize()
    write(profiler, out / "prefill2048.txt")


def host_profile(rank: Rank) -> None:
    """Where the host's time of a decode step of 64 goes."""
    import cProfile
    import pstats

    from nitsum.messages import Work

    profiler = cProfile.Profile()
    for i in range(40):
        profiler.enable()
        rank.send([Work(slot, CONTEXT + i, 1, True) for slot in range(64)])
        profiler.disable()
        rank.wait(1)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(16)


def write(profiler: Any, path: Path) -> None:
    table = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90
    )
    path.write_text(table)
    for line in table.splitlines()[3:16]:
        print(line[:90], line[-75:])


if __name__ == "__main__":
    main()
