"""First contact with a GPU: does each part run, and how far from the floor is it?

    python -m benchmarks.gpu_probe [--tp 2] [--layers 32] [--out FOLDER]

Workers without an engine, Llama-3.1-8B shape, dummy bfloat16 weights. Prints a short table and
writes `probe.json`. Nothing stops at the first failure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
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
NUM_MEMBERS = 8
"""At least the degree: pages are the same on all of them."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    from nitsum.shape import Geometry, ModelShape
    from nitsum.shared import SPAWN, allocate

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": args.layers}))
    specs = [make_spec(folder, rank, args.tp) for rank in range(args.tp)]
    shared = allocate(specs[0], Geometry(ModelShape.from_folder(folder), args.tp))
    others = [SPAWN.Process(target=probe, args=(spec, shared, args.out)) for spec in specs[1:]]
    for process in others:
        process.start()
    probe(specs[0], shared, args.out)
    for process in others:
        process.join(60)
        process.kill()
    os._exit(0)


def probe(spec: Any, shared: Any, out: Path) -> None:
    """What every rank does, in step; the first one notes and prints."""
    from nitsum.worker.cuda.symmetric import prepare_environment

    prepare_environment()
    if spec.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    figures: dict[str, Any] = {}
    attempt(figures, "copy", lambda: copy_bandwidth(figures, spec.rank))
    rank = attempt(figures, "start", lambda: make_rank(figures, spec, shared))
    if rank is not None:
        for tokens in (512, 1155, 2048, 4096):
            attempt(figures, f"prefill {tokens}", lambda n=tokens: prefill(figures, rank, n))
        attempt(figures, "fill", lambda: fill(figures, rank))
        for batch in (1, 8, 32, 64, 128, 256):
            attempt(figures, f"decode {batch}", lambda b=batch: decode(figures, rank, b))
        attempt(figures, "host", lambda: host_profile(rank))
        attempt(figures, "profile", lambda: profile(rank, out))
    if not spec.rank:
        (out / f"probe_tp{spec.num_ranks}.json").write_text(json.dumps(figures, indent=1))
    sys.stdout.flush()
    if spec.rank:
        os._exit(0)


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


def median(values: list[float]) -> float:
    """Of what the leader alone has."""
    return statistics.median(values) if values else 0.0


def copy_bandwidth(figures: dict[str, Any], rank: int) -> None:
    import torch

    torch.cuda.set_device(rank)
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
        from nitsum.shared import Progress
        from nitsum.worker.cuda.setup import start

        self.runner, self.ready = start(spec, shared)
        self.group = Group(spec.num_ranks, 0)
        self.spec = spec
        self.step_id = 0
        self.num_done = 0
        self.host_s: list[float] = []
        self._progress = Progress(shared.progress)

    def send(self, work: list[Any], joins: Any = (), pages: Any = ()) -> None:
        from nitsum.messages import Step

        self.step_id += 1
        step = Step(self.step_id, 1, self.group, list(joins), list(pages), work)
        started_s = time.perf_counter()
        self.runner.obey(step)
        self.host_s.append(time.perf_counter() - started_s)

    def wait(self, count: int) -> list[Any]:
        """Until `count` more steps are done; only the leader has something to say of them."""
        done: list[Any] = []
        self.num_done += count
        while self._progress.completed(self.spec.rank) < self.num_done:
            done.extend(self.runner.finished())
        return done


def make_spec(folder: Path, rank: int, tp: int) -> Any:
    from nitsum.messages import WorkerSpec
    from nitsum.plan import Group

    return WorkerSpec(
        rank=rank, num_ranks=tp, device="cuda", model=str(folder), load_format="dummy",
        dtype="bfloat16", max_tp=tp, groups=[Group(tp, 0)], block_tokens=16, num_units=0,
        max_slots=1024, max_model_len=8192, max_batch_tokens=8192, max_num_seqs=256,
        num_threads=4, engine_address=f"ipc://{folder}/engine", inbox_address="",
    )  # fmt: skip


def make_rank(figures: dict[str, Any], spec: Any, shared: Any) -> Rank:
    rank = Rank(spec, shared)
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
    pages = list(range(first, first + -(-num_tokens // 16)))
    return Pages(slot, 0, [pages] * NUM_MEMBERS)


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
        done = rank.wait(1)
        walls.append((time.perf_counter() - started_s) * 1e3)
        seconds.extend(d.seconds * 1e3 for d in done)
    note(
        figures,
        **{
            f"prefill_ms_tp{rank.spec.num_ranks}_{num_tokens}": median(seconds[2:]),
            f"prefill_wall_ms_tp{rank.spec.num_ranks}_{num_tokens}": statistics.median(walls[2:]),
            f"prefill_host_ms_tp{rank.spec.num_ranks}_{num_tokens}": 1e3
            * statistics.median(rank.host_s[-6:]),
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
        done = rank.wait(1)
        now_s = time.perf_counter()
        gaps.append(1e3 * (now_s - last_s))
        seconds.extend(1e3 * d.seconds for d in done)
        last_s = now_s
    rank.wait(1)
    note(
        figures,
        **{
            f"decode_gap_ms_tp{rank.spec.num_ranks}_b{batch}": statistics.median(gaps[8:]),
            f"decode_ms_tp{rank.spec.num_ranks}_b{batch}": median(seconds[8:]),
            f"host_ms_per_step_tp{rank.spec.num_ranks}_b{batch}": 1e3
            * statistics.median(rank.host_s[8:]),
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
        write(profiler, rank, out / f"decode{batch}_tp{rank.spec.num_ranks}.txt")
    joins, pages = [join_of(300, 2048)], [pages_of(300, 2048)]
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            rank.send([Work(300, 0, 2048, True)], joins, pages)
            rank.wait(1)
        torch.cuda.synchronize()
    write_timeline(profiler, out / f"timeline_prefill_rank{rank.spec.rank}.json")
    write(profiler, rank, out / f"prefill2048_tp{rank.spec.num_ranks}.txt")


def write_timeline(profiler: Any, path: Path) -> None:
    """[name, start us, duration us] of every kernel, in order."""
    kernels = sorted(
        (event.time_range.start, event.time_range.elapsed_us(), event.name)
        for event in profiler.events()
        if str(event.device_type).endswith("CUDA")
    )
    path.write_text(json.dumps([[name[:60], at, took] for at, took, name in kernels]))


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


def write(profiler: Any, rank: Rank, path: Path) -> None:
    if rank.spec.rank:
        return
    table = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90
    )
    path.write_text(table)
    for line in table.splitlines()[3:16]:
        print(line[:90], line[-75:])


if __name__ == "__main__":
    main()
