"""A load that flips, served: does the controller change the layout, and was it right?

    python -m benchmarks.live_flip profile  --out FOLDER    # a cost table of this machine, minutes
    python -m benchmarks.live_flip foresee  --out FOLDER    # no GPU: TP2, 2xTP1, ours at some rates
    python -m benchmarks.live_flip static   --out FOLDER    # TP2, then 2xTP1, one server
    python -m benchmarks.live_flip adaptive --out FOLDER    # the same load with the controller
    python -m benchmarks.live_flip report   --out FOLDER    # no GPU: served beside simulated

in this order; what a part writes, the next ones read from FOLDER, so it may go to a machine without
GPUs and back. Profile and serve on one machine: on two of a kind, prompts once took half as
long again. The 8B shape with random weights on two GPUs, `benchmarks/workloads/
live_flip.yaml`. `report` prints served beside simulated latencies and goodput of what was served
(`nitsum simulate --compare`, of the client's events and of the engine's) and, for the controller,
what it predicted beside what came (`nitsum explain`). On a CPU: `--device cpu --model CHECKPOINT`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
from msgspec.structs import replace

from benchmarks.gpu_serve import FRONT_DOOR_S, HOST_LATENCY_S, wait_for_url, write_model
from nitsum.metrics.targets import TierRule, load_targets, save_targets

LOAD = Path(__file__).parent / "workloads" / "live_flip.yaml"
PLANS = "TP2,2xTP1"
WARMUP_S = 10
RATES = (0.95, 1.0, 1.05)
HOST = ["--front-door", f"{FRONT_DOOR_S}", "--host-latency", f"{HOST_LATENCY_S}"]


@dataclass(frozen=True)
class Run:
    """Where, and with what; every part is started with the same."""

    out: Path
    device: str
    model: str
    load: Path
    rate: float
    factor: float
    pace: float
    deadline: float
    slots: int
    step_tokens: int
    kv: str

    @property
    def sizes(self) -> list[str]:
        return [
            "--max-num-seqs", str(self.slots), "--max-batch-tokens", str(self.step_tokens),
            "--kv-memory", self.kv, "--block-tokens", "32",
        ]  # fmt: skip

    @property
    def served(self) -> list[str]:
        """How ranks are started."""
        random = ["--load-format", "dummy"] if self.device == "cuda" else []
        return [self.model, "--ranks", "2", "--device", self.device, *random, *self.sizes]

    @property
    def simulated(self) -> list[str]:
        """The twin of it."""
        machine, dtype = (
            ("2xH100-80GB", "bfloat16") if self.device == "cuda" else ("2xCPU", "float32")
        )
        return [
            "simulate", "--model", self.model, "--machine", machine, "--dtype", dtype, *self.sizes,
            *self.cost, *HOST, "--warmup", str(WARMUP_S), "--small-samples",
        ]  # fmt: skip

    @property
    def cost(self) -> list[str]:
        """What `profile` measured; before it, the table that comes with Nitsum."""
        table = self.out / "cost.json"
        return ["--cost", str(table)] if table.is_file() else []

    def file(self, name: str) -> str:
        return str(self.out / name)


def profile(run: Run) -> None:
    """The cost table, and from it the targets."""
    nitsum(["profile", *run.served, "--plans", PLANS, "-o", run.file("cost.json")])
    fix_targets(run)


def fix_targets(run: Run) -> None:
    """The usual rule with first tokens `factor` times and a time per token of priority `pace` times
    as long; the bulk has a deadline for whole answers instead."""
    path = run.out / "targets.json"
    quick = ["--plan", "TP2", "--trace", f"mix:{run.load}", "--duration", "1"]
    nitsum([*run.simulated, *quick, "--save-targets", str(path), "--json"], run.out / "lone.json")
    targets = load_targets(path).with_k(run.factor)
    urgent = targets.tiers["priority"]
    assert urgent.tpot_s is not None
    tiers = dict(targets.tiers)
    tiers["priority"] = replace(urgent, tpot_s=run.pace * urgent.tpot_s)
    tiers["default"] = TierRule(deadline_s=run.deadline)
    save_targets(replace(targets, tiers=tiers), path)


def foresee(run: Run) -> None:
    """Goodput of both layouts and of ours, by rate: where a change pays, and by how much.

    Before `profile`, by the table that comes with Nitsum; `profile` fixes the targets anew.
    """
    if not (run.out / "targets.json").is_file():
        fix_targets(run)
    for rate in RATES:
        found = {
            name: _foreseen(run, rate, plans)
            for name, plans in (
                ("TP2", ["--plan", "TP2"]),
                ("2xTP1", ["--plan", "2xTP1"]),
                ("ours", ["--plans", PLANS]),
            )
        }
        best = max(found["TP2"], found["2xTP1"])
        words = ", ".join(f"{name} {value:.2f}/s" for name, value in found.items())
        print(f"rate {rate:g}: {words}: {found['ours'] / best:.3f}x the best", flush=True)


def _foreseen(run: Run, rate: float, plans: list[str]) -> float:
    out = run.out / "foreseen.json"
    asked = ["--trace", f"mix:{run.load}", "--rate", f"{rate:g}"]
    held = ["--targets", run.file("targets.json"), "--json"]
    nitsum([*run.simulated, *plans, *asked, *held], out)
    return json.loads(out.read_text())["figures"]["sim_goodput_requests_per_s"]


def static(run: Run) -> None:
    """Both layouts under the same load, one after the other."""
    log, server = start(run, "static", [])
    try:
        url = wait_for_url(log, server)
        load(run, url, "tp2")
        switch(url, "2xTP1")
        load(run, url, "2xtp1")
    finally:
        stop(server)


def adaptive(run: Run) -> None:
    flags = ["--controller", "adaptive", *run.cost]
    log, server = start(run, "adaptive", flags)
    try:
        load(run, wait_for_url(log, server), "ours")
    finally:
        stop(server)


def report(run: Run) -> None:
    """Of the parts that were served."""
    for name, plan in (("tp2", "TP2"), ("2xtp1", "2xTP1")):
        compare(run, f"{name}.jsonl", ["--plans", PLANS, "--plan", plan, "--no-control"])
    for events in ("ours.jsonl", "engine_adaptive.jsonl"):
        compare(run, events, ["--plans", PLANS])
    if (run.out / "engine_adaptive.jsonl").is_file():
        nitsum(["explain", run.file("engine_adaptive.jsonl")])


def start(run: Run, name: str, flags: list[str]) -> tuple[Path, subprocess.Popen[bytes]]:
    events, log = run.out / f"engine_{name}.jsonl", run.out / f"serve_{name}.log"
    events.unlink(missing_ok=True)  # a server appends
    words = [
        "serve", *run.served, "--plans", PLANS, "--targets", run.file("targets.json"),
        "--port", "0", "--served-model-name", "shape", "--ledger", "none",
        "--events", str(events), *flags,
    ]  # fmt: skip
    command = [sys.executable, "-u", "-m", "nitsum.cli", *words]
    return log, subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    server.wait(60)


def switch(url: str, plan: str) -> None:
    httpx.post(f"{url}/admin/plans/switch", json={"plan": plan}, timeout=60).raise_for_status()


def load(run: Run, url: str, name: str) -> None:
    nitsum([
        "bench", "serve", "--url", url, "--trace", f"mix:{run.load}", "--rate", f"{run.rate:g}",
        "--duration", "0", "--targets", run.file("targets.json"), "--warmup", str(WARMUP_S),
        "--vocab", "2000", "--small-samples", "--json", run.file(f"{name}.jsonl"),
        "--summary", run.file(f"{name}.json"),
    ])  # fmt: skip


def compare(run: Run, events: str, plans: list[str]) -> None:
    if not (run.out / events).is_file():
        return
    print(f"\n{events}, served and simulated", flush=True)
    held = ["--targets", run.file("targets.json"), "--compare", run.file(events)]
    nitsum([*run.simulated, *plans, *held])


def nitsum(words: list[str], out: Path | None = None) -> None:
    """Runs the command line; its output goes on ours, or into `out`."""
    command = [sys.executable, "-m", "nitsum.cli", *words]
    if out is None:
        subprocess.run(command, check=True)
    else:
        out.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parts = {part.__name__: part for part in (profile, foresee, static, adaptive, report)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="", help="a checkpoint (default: the 8B shape)")
    parser.add_argument("--load", type=Path, default=LOAD)
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies the load's rates")
    parser.add_argument("--factor", type=float, default=1.0, help="of times to the first token")
    parser.add_argument("--pace", type=float, default=0.6, help="of priority's time per token")
    parser.add_argument("--deadline", type=float, default=3.0, help="of bulk answers, seconds")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--kv", default="40GiB", help="KV arena of one rank")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.model:
        args.model = str(args.out / "shape")
        Path(args.model).mkdir(exist_ok=True)
        write_model(Path(args.model))
    fields = {name: value for name, value in vars(args).items() if name != "part"}
    parts[args.part](Run(**fields))


if __name__ == "__main__":
    main()
