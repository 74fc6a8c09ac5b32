"""Serving points: a server for each side, `nitsum bench serve` and a result for each point."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.goodput.points import Point, Points, device_s, groups, save
from benchmarks.gpu_serve import write_model
from nitsum.bench.compare import Side as ServerSide
from nitsum.bench.compare import running
from nitsum.bench.provenance import hardware
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.cost.shipped import shipped_table
from nitsum.cost.table import TableCost
from nitsum.metrics.targets import load_targets

VOCAB = 2000
"""Prompts are drawn from so many tokens, where a model has them."""


@dataclass(frozen=True)
class Job:
    """What is served, with what, and where results go."""

    file: Points
    targets: Path
    out: Path
    model: str
    """A checkpoint; empty: the 8B shape, which is written to `out`."""
    command: str
    cost: str = ""
    """A file of step times; empty: the shipped one, where points were planned with a table."""
    flags: list[str] = field(default_factory=list[str])
    """More of `nitsum serve`."""

    def result(self, point: Point) -> Path:
        return self.out / f"{point.name}.json"


def run(job: Job, points: list[Point]) -> None:
    """Serve those that have no result yet, server by server."""
    job.out.mkdir(parents=True, exist_ok=True)
    model, steps = _model(job), _steps(job)
    cost = TableCost.load(Path(steps)) if steps else None
    job.file.basis.check(shape_named(model), cost, load_targets(job.targets))
    missing = [point for point in points if not _has_result(job, point)]
    expected_s = device_s(job.file, missing)
    print(f"{len(missing)} of {len(points)} points to serve: about {expected_s:.0f} s", flush=True)
    start_s = time.monotonic()
    for group in groups(missing):
        for point in _serve(job, group):
            print(f"{time.monotonic() - start_s:5.0f} s: {point.name} served", flush=True)


def _has_result(job: Job, point: Point) -> bool:
    """Raises `ConfigError` for one of another plan."""
    path = job.result(point)
    if not path.is_file():
        return False
    job.file.check(point, json.loads(path.read_text()), path)
    return True


def _serve(job: Job, group: list[Point]) -> Iterator[Point]:
    """The points of one side, on one server."""
    side = group[0].side
    engine = job.out / f"{group[0].name}.server.jsonl"
    engine.unlink(missing_ok=True)  # a server appends
    flags = _flags(job, side.flags(job.file.num_ranks, job.file.basis.limits), engine)
    print(f"{side.name}: nitsum serve {shlex.join(flags)}", flush=True)
    with running(ServerSide(side.name, serve_flags=tuple(flags))) as url:
        for point in group:
            _load(job, point, url, engine)
            _keep(job, point)
            yield point


def _flags(job: Job, of_side: list[str], events: Path) -> list[str]:
    """Ports are chosen by whoever starts it."""
    steps = _steps(job)
    return [
        _model(job), "--device", job.file.device, *of_side,
        *(["--load-format", "dummy"] if not job.model else []),
        *(["--cost", steps] if steps else []),
        "--served-model-name", "shape", "--targets", str(job.targets), "--events", str(events),
        "--ledger", "none", "--log-level", "warning", *job.flags,
    ]  # fmt: skip


def _model(job: Job) -> str:
    """The 8B shape unless there is a checkpoint."""
    if job.model:
        return job.model
    folder = job.out / "shape"
    folder.mkdir(exist_ok=True)
    write_model(folder)
    return str(folder)


def _steps(job: Job) -> str:
    """The file of step times that every side is given; empty: none."""
    if job.cost or job.file.basis.steps_sha256 is None:
        return job.cost
    dtype = "bfloat16" if job.file.device == "cuda" else "float32"
    shape, machine = job.file.basis.shape, Machine.parse(job.file.machine)
    return str(shipped_table(shape, machine, dtype) or "")


def _load(job: Job, point: Point, url: str, engine: Path) -> None:
    """Send the point's arrivals."""
    mix = job.out / f"{point.name}.mix.json"
    save(job.file.mix(point), mix)
    command = [
        sys.executable, "-m", "nitsum.cli", "bench", "serve", "--url", url,
        "--trace", f"mix:{mix}", "--duration", "0", "--targets", str(job.targets),
        "--warmup", f"{job.file.warmup_s:g}", "--drain", f"{job.file.drain_s:g}",
        "--vocab", str(_vocab(job)), "--small-samples",
        "--server-events", str(engine), "--server-model", _model(job),
        "--json", str(_events(job, point)), "--summary", str(_client(job, point)),
    ]  # fmt: skip
    lasts_s = job.file.mixes[point.mix].duration_s
    print(f"{point.name}: load {point.load:.2f}/s for {lasts_s:.0f} s", flush=True)
    subprocess.run(command, check=True)


def _vocab(job: Job) -> int:
    return min(VOCAB, shape_named(job.model).vocab_size) if job.model else VOCAB


def _events(job: Job, point: Point) -> Path:
    return job.out / f"{point.name}.client.jsonl.gz"


def _client(job: Job, point: Point) -> Path:
    return job.out / f"{point.name}.client.json"


def _keep(job: Job, point: Point) -> None:
    """One file a point: what the client saw, what the server did meanwhile, where and how."""
    seen: dict[str, Any] = json.loads(_client(job, point).read_text())
    content = seen | {
        "command": job.command,
        "hardware": f"{job.file.machine}; {hardware()}",
        "point_sha256": job.file.digest(point),
        "notes": f"{point.side.name}, load {point.load:.2f}/s, {point.mix}; {seen['notes']}",
    }
    job.result(point).write_text(json.dumps(content, indent=1) + "\n")
