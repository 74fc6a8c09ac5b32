"""`nitsum serve --device cuda` under load, through HTTP: the Llama-3.1-8B shape, random weights.

    python -m benchmarks.gpu_serve --out FOLDER [--plans TP2,2xTP1] [--clients 64,256]

For each plan, starts the server as a user would and lets so many clients send one request after the
other (1,155 tokens in, 211 out, greedy, streamed; six each, the first of which is warm-up), after a
few alone. The client is that of `nitsum bench serve`, in processes of at most 32 streams, so that
it is not the limit. Prints and writes `serve.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gpu_probe import SHAPE
from nitsum.bench.provenance import summary
from nitsum.bench.serve import find_endpoint, run_load
from nitsum.metrics.percentiles import percentile
from nitsum.metrics.records import RequestRecord
from nitsum.server.run import loop_factory
from nitsum.workload.items import Segment, WorkItem

NUM_PROMPT, NUM_ANSWER = 1155, 211
FRONT_DOOR_S, HOST_LATENCY_S = 0.002, 0.0014
"""Medians of what 2x H100 served: to the engine, and from a step's end to its tokens there."""
STREAMS_A_PROCESS = 32
VOCAB = 100_000
"""Prompts are drawn from so many tokens."""
NUM_ROUNDS = 6
"""Requests of each client; the first and the last are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--plans", default="TP2,2xTP1")
    parser.add_argument("--clients", default="64,256")
    parser.add_argument("--flags", default="", help="more flags of nitsum serve")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    write_model(folder)
    figures: dict[str, float] = {}
    for plan in args.plans.split(","):
        log = args.out / f"serve_{plan}.log"
        server = start(folder, plan, log, args.flags.split())
        try:
            url = wait_for_url(log, server)
            clients = [int(count) for count in args.clients.split(",")]
            figures |= measure(url, plan.lower(), clients)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        for name, value in figures.items():
            if plan.lower() in name:
                print(f"{name:45}{value:12.4f}", flush=True)
        (args.out / "serve.json").write_text(json.dumps(summary(figures), indent=1))


def write_model(folder: Path) -> None:
    """A config, and a tokenizer with a token for every id; the weights are random."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"w{i}" for i in range(SHAPE["vocab_size"] - len(words))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def start(folder: Path, plan: str, log: Path, more: list[str]) -> subprocess.Popen[bytes]:
    flags = {
        "--device": "cuda", "--load-format": "dummy", "--port": "0", "--ranks": "2",
        "--plans": plan, "--served-model-name": "shape",
    }  # fmt: skip
    words = [word for pair in flags.items() for word in pair]
    return subprocess.Popen(
        [sys.executable, "-m", "nitsum.cli", "serve", str(folder), *words, *more],
        stdout=log.open("wb"), stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def wait_for_url(log: Path, server: subprocess.Popen[bytes]) -> str:
    while server.poll() is None:
        found = re.search(r"Serving \S+ at (\S+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.2)
    raise SystemExit(log.read_text()[-3000:])


class Job(NamedTuple):
    """`num_requests`, `num_clients` at a time."""

    url: str
    name: str
    num_clients: int
    num_requests: int


def measure(url: str, plan: str, clients: list[int]) -> dict[str, float]:
    send(Job(url, "warm-up", 8, 8))
    alone = [record for i in range(5) for record in send(Job(url, f"alone{i}", 1, 1))]
    figures = {
        f"lone_ttft_ms_p50_{plan}": 1e3 * statistics.median(r.ttft_s or 0.0 for r in alone),
        f"lone_tpot_ms_p50_{plan}": 1e3 * statistics.median(r.tpot_s or 0.0 for r in alone),
    }
    num_processes = -(-max(clients) // STREAMS_A_PROCESS)
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(send, [Job(url, f"first{i}", 1, 1) for i in range(num_processes)]))
        for count in clients:
            parts = -(-count // STREAMS_A_PROCESS)
            share = count // parts
            jobs = [Job(url, f"c{count}.{i}", share, NUM_ROUNDS * share) for i in range(parts)]
            records = [record for part in pool.map(send, jobs) for record in part]
            figures |= figures_of(records, count, f"{plan}_c{count}")
    return figures


def send(job: Job) -> list[RequestRecord]:
    """Raises if an answer is not whole."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_send(job))


async def _send(job: Job) -> list[RequestRecord]:
    endpoint, _ = await find_endpoint(job.url)
    load = items(job.name, job.num_requests)
    outcome = await run_load(endpoint, load, vocab_size=VOCAB, max_open=job.num_clients)
    assert outcome.state.num_tokens == job.num_requests * NUM_ANSWER, outcome.state
    return list(outcome.recorder.requests.values())


def figures_of(records: list[RequestRecord], num_clients: int, name: str) -> dict[str, float]:
    """Of the requests between the first and the last round."""
    ended = sorted(records, key=lambda record: record.token_times[-1])
    middle = ended[num_clients:-num_clients]
    took_s = middle[-1].token_times[-1] - ended[num_clients - 1].token_times[-1]
    gaps = sorted(record.longest_gap_s or 0.0 for record in middle)
    firsts = sorted(record.ttft_s or 0.0 for record in middle)
    paces = sorted(record.tpot_s or 0.0 for record in middle)
    return {
        f"http_requests_per_s_{name}": len(middle) / took_s,
        f"http_output_tokens_per_s_{name}": NUM_ANSWER * len(middle) / took_s,
        f"http_ttft_ms_p50_{name}": 1e3 * percentile(firsts, 0.5),
        f"http_ttft_ms_p99_{name}": 1e3 * percentile(firsts, 0.99),
        f"http_tpot_ms_p50_{name}": 1e3 * percentile(paces, 0.5),
        f"http_tpot_ms_p99_{name}": 1e3 * percentile(paces, 0.99),
        f"longest_gap_p50_ms_{name}": 1e3 * percentile(gaps, 0.5),
        f"longest_gap_p99_ms_{name}": 1e3 * percentile(gaps, 0.99),
    }


def items(name: str, count: int) -> list[WorkItem]:
    """All at once."""
    names = [f"{name}.{i}" for i in range(count)]
    return [
        WorkItem(name, 0.0, NUM_ANSWER, "default", "", (Segment(name, NUM_PROMPT),))
        for name in names
    ]


if __name__ == "__main__":
    main()
