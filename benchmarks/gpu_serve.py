"""`nitsum serve --device cuda` under load, through HTTP: the Llama-3.1-8B shape, random weights.

    python -m benchmarks.gpu_serve --out FOLDER [--requests 512] [--max-num-seqs 512]

Starts the server as a user would, sends all requests at once (1,155 tokens in, 211 out, greedy,
streamed) with the client of `nitsum bench serve`, then a few alone; prints and writes `serve.json`.
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
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gpu_probe import SHAPE
from nitsum.bench.provenance import summary
from nitsum.bench.serve import find_endpoint, run_load
from nitsum.metrics.records import RequestRecord
from nitsum.server.run import loop_factory
from nitsum.workload.items import Segment, WorkItem

NUM_PROMPT, NUM_ANSWER = 1155, 211


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    write_model(folder)
    started_s = time.monotonic()
    server = start(folder, args.max_num_seqs, args.out / "serve.log")
    try:
        url = wait_for_url(args.out / "serve.log", server)
        figures = {"serve_start_s": time.monotonic() - started_s}
        print(f"{url} after {figures['serve_start_s']:.1f} s", flush=True)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            figures |= runner.run(load(url, args.requests))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    for name, value in figures.items():
        print(f"{name:45}{value:12.4f}")
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


def start(folder: Path, max_num_seqs: int, log: Path) -> subprocess.Popen[bytes]:
    flags = {
        "--device": "cuda", "--load-format": "dummy", "--port": "0", "--ranks": "1",
        "--max-num-seqs": str(max_num_seqs), "--max-batch-tokens": "8192",
        "--served-model-name": "shape",
    }  # fmt: skip
    words = [word for pair in flags.items() for word in pair]
    return subprocess.Popen(
        [sys.executable, "-m", "nitsum.cli", "serve", str(folder), *words],
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


async def load(url: str, num_requests: int) -> dict[str, float]:
    endpoint, _ = await find_endpoint(url)

    async def send(name: str, count: int) -> list[RequestRecord]:
        outcome = await run_load(endpoint, items(name, count), vocab_size=100_000)
        assert outcome.state.num_tokens == count * NUM_ANSWER, outcome.state
        return list(outcome.recorder.requests.values())

    await send("warm-up", 8)
    started_s = time.monotonic()
    many = await send("load", num_requests)
    took_s = time.monotonic() - started_s
    alone = [record for i in range(5) for record in await send(f"alone{i}", 1)]
    return {
        "saturation_output_tokens_per_s_tp1": num_requests * NUM_ANSWER / took_s,
        "saturation_requests_per_s_tp1": num_requests / took_s,
        "saturation_longest_gap_ms_p50": 1e3 * statistics.median(map(longest_gap_s, many)),
        "lone_ttft_ms_p50": 1e3 * statistics.median(record.ttft_s or 0.0 for record in alone),
        "lone_tpot_ms_p50": 1e3 * statistics.median(record.tpot_s or 0.0 for record in alone),
    }


def longest_gap_s(record: RequestRecord) -> float:
    return record.longest_gap_s or 0.0


def items(name: str, count: int) -> list[WorkItem]:
    """All at once."""
    names = [f"{name}.{i}" for i in range(count)]
    return [
        WorkItem(name, 0.0, NUM_ANSWER, "default", "", (Segment(name, NUM_PROMPT),))
        for name in names
    ]


if __name__ == "__main__":
    main()
