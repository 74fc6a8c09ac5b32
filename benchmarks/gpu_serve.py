"""`nitsum serve --device cuda` under load, through HTTP: the Llama-3.1-8B shape, random weights.

    python -m benchmarks.gpu_serve --out FOLDER [--requests 512] [--max-num-seqs 512]

Starts the server as a user would, sends all requests at once (1,155 tokens in, 211 out, greedy,
not streamed), then a few alone and streamed; prints and writes `serve.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gpu_probe import SHAPE
from nitsum.bench.provenance import summary

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
        figures |= asyncio.run(load(url, args.requests))
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
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await asyncio.gather(*(complete(client, i) for i in range(8)))  # warm-up
        started_s = time.monotonic()
        counts = await asyncio.gather(*(complete(client, 100 + i) for i in range(num_requests)))
        took_s = time.monotonic() - started_s
        alone = [await stream(client, 9000 + i) for i in range(5)]
    assert set(counts) == {NUM_ANSWER}, sorted(set(counts))
    return {
        "saturation_output_tokens_per_s_tp1": num_requests * NUM_ANSWER / took_s,
        "saturation_requests_per_s_tp1": num_requests / took_s,
        "lone_ttft_ms_p50": 1e3 * statistics.median(first for first, _ in alone),
        "lone_tpot_ms_p50": 1e3 * statistics.median(gap for _, gap in alone),
    }


def body(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    prompt = [draw.randrange(1000, 100000) for _ in range(NUM_PROMPT)]
    fixed = {"model": "shape", "max_tokens": NUM_ANSWER, "temperature": 0, "ignore_eos": True}
    return {**fixed, "prompt": prompt}


async def complete(client: httpx.AsyncClient, number: int) -> int:
    answer = await client.post("/v1/completions", json=body(number))
    assert answer.status_code == 200, answer.text[:500]
    return answer.json()["usage"]["completion_tokens"]


async def stream(client: httpx.AsyncClient, number: int) -> tuple[float, float]:
    """(time to the first token, mean gap after it) of a request that has the engine to itself."""
    times: list[float] = []
    started_s = time.monotonic()
    request = {**body(number), "stream": True}
    async with client.stream("POST", "/v1/completions", json=request) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())  # noqa: PERF401 - one at a time, as they come
    return times[0] - started_s, (times[-1] - times[0]) / (NUM_ANSWER - 1)


if __name__ == "__main__":
    main()
