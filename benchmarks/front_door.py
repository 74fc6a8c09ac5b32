"""What HTTP costs: `nitsum serve`'s server and the load client around an engine without a model.

    python -m benchmarks.front_door [--model FOLDER] [--streams 256] [--requests 512] [--out FOLDER]

Three processes, as in a deployment: the engine (the real core and its messages; its ranks only pass
the time), the server at its defaults, and the client of `nitsum bench serve`. Each load is sent
with so many requests open at a time; CPU time of each process is divided by tokens and requests:

    whole = requests x (request + tokens x token)      answers of 211 tokens
    short = requests x (request + token)               answers of 1 token

A lone request's time to its first token, less the step it takes, is what the way costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import zmq

from nitsum.bench.provenance import summary
from nitsum.bench.serve import find_endpoint, run_load
from nitsum.bench.stream_client import Endpoint
from nitsum.clock import MonotonicClock
from nitsum.config import EngineConfig
from nitsum.cost.protocol import FixedCost
from nitsum.engine.client import ZmqEngineClient
from nitsum.engine.core import Core
from nitsum.engine.ipc import ServerLink
from nitsum.engine.process import MESSAGES_A_TURN, receive
from nitsum.engine.tally import Tally
from nitsum.events import NullSink
from nitsum.kv.cache import ArenaShape
from nitsum.messages import FromWorker, Ready, Step, StepDone, ToWorker
from nitsum.plan import PlanSet, default_plans
from nitsum.server import logs
from nitsum.server.run import loop_factory, serve
from nitsum.server.settings import ServerSettings
from nitsum.workload.items import Segment, WorkItem

NUM_PROMPT, NUM_ANSWER = 1155, 211
CONTEXT = 2048
VOCABULARY = 30_000
SPAWN = get_context("spawn")
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", type=Path, default=Path.home() / ".cache/nitsum/smollm2-135m-instruct"
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--answer", type=int, default=NUM_ANSWER, help="tokens of an answer")
    parser.add_argument("--step-ms", type=float, default=28.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Stack(args, Path(name)) as stack:
        print(f"{stack.url}, server {stack.server.pid}", flush=True)
        figures = measure(args, stack)
    for name, value in figures.items():
        print(f"{name:45}{value:12.3f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "summary.json").write_text(json.dumps(summary(figures), indent=1) + "\n")


def measure(args: argparse.Namespace, stack: Stack) -> dict[str, float]:
    load(stack, 64, 8, args.streams)  # warm-up
    whole = load(stack, args.requests, args.answer, args.streams)
    short = load(stack, args.requests, 1, args.streams)
    alone = [load(stack, 1, 2, 1).ttft_s for _ in range(9)]
    figures = {
        "output_tokens_per_s": whole.num_tokens / whole.wall_s,
        "tokens_per_chunk": whole.num_tokens / whole.num_chunks,
        "longest_gap_p50_ms": 1e3 * whole.longest_gap_p50_s,
        "longest_gap_p99_ms": 1e3 * whole.longest_gap_p99_s,
        "lone_ttft_over_step_ms": 1e3 * statistics.median(alone) - args.step_ms,
    }
    for process in ("server", "client", "engine"):
        token, request = costs(whole, short, process, args.answer)
        figures[f"{process}_cpu_per_token_us"] = 1e6 * token
        figures[f"{process}_cpu_per_request_us"] = 1e6 * request
        figures[f"{process}_cpu_share"] = whole.cpu_s[process] / whole.wall_s
    return figures


def costs(whole: Sent, short: Sent, process: str, num_answer: int) -> tuple[float, float]:
    """CPU seconds per token and per request."""
    a, b = whole.cpu_s[process] / whole.num_requests, short.cpu_s[process] / short.num_requests
    token = (a - b) / (num_answer - 1)
    return token, b - token


# -- the engine --


class PacedExecutor:
    """One rank whose steps all last the same; the tokens are any."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._num_sent = 0
        self._free_s = 0.0
        self._replies: list[tuple[float, StepDone]] = []

    def start(self) -> list[Ready]:
        return [Ready(0, 0, {}, {})]

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        self._num_sent += 1
        assert isinstance(message, Step), "one lane, one plan: nothing moves"
        self._free_s = max(time.monotonic(), self._free_s) + self.step_s
        num_drawn = sum(work.samples for work in message.work)
        tokens = [1000 + (message.step_id + 7 * i) % 4000 for i in range(num_drawn)]
        self._replies.append((self._free_s, StepDone(message.step_id, 0, tokens, self.step_s)))

    def num_sent(self, rank: int) -> int:
        return self._num_sent

    def poll(self, timeout_s: float) -> list[FromWorker]:
        now, found = time.monotonic(), list[FromWorker]()
        while self._replies and self._replies[0][0] <= now:
            found.append(self._replies.pop(0)[1])
        return found

    def wait_ms(self) -> int:
        """Until the next reply."""
        if not self._replies:
            return 500
        return max(0, round(1e3 * (self._replies[0][0] - time.monotonic())))

    def close(self) -> None:
        pass


def run_engine(address: str, step_s: float, num_streams: int, parent: Connection) -> None:
    """The loop of `nitsum.engine.process`, over the paced executor."""
    plans: PlanSet = default_plans(1)
    config = EngineConfig(
        model="none", plans=plans, max_num_seqs=num_streams, max_batch_tokens=8192
    )
    num_units = num_streams * (CONTEXT // config.block_tokens + 1)
    arena = ArenaShape(1, num_units, 1, config.block_tokens, 1)
    executor = PacedExecutor(step_s)
    tally = Tally(NullSink(), 1, {})
    core = Core(config, arena, executor, MonotonicClock(), tally, cost=FixedCost(step_s, 0.0))
    link = ServerLink(address)
    poller = zmq.Poller()
    poller.register(link.socket, zmq.POLLIN)
    poller.register(parent.fileno(), zmq.POLLIN)
    parent.send("ready")
    while parent.fileno() not in dict(poller.poll(executor.wait_ms())):
        for message in link.receive(MESSAGES_A_TURN):
            receive(core, link, message, tally)
        link.send(*core.turn())
    link.close()


# -- the server --


def run_server(settings: ServerSettings, address: str, log: Path, parent: Connection) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    logs.set_up("info", "text")
    serve(settings, ZmqEngineClient(address), on_ready=parent.send)


class Stack:
    """Engine and server; ends them when left."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder

    def __enter__(self) -> Stack:
        address = f"ipc://{self._folder}/engine"
        args = (address, self._args.step_ms / 1e3, self._args.streams)
        self._engine_end, self.engine = start(run_engine, *args)
        self._engine_end.recv()
        settings = ServerSettings(
            checkpoint=self._args.model,
            model_names=("none",),
            max_model_len=CONTEXT,
            vocab_size=VOCABULARY,
            port=0,
            ledger=str(self._folder / "ledger.db"),
            data_dir=self._folder,
        )
        own, self.server = start(run_server, settings, address, self._folder / "server.log")
        self.url: str = own.recv()
        self.client_end, self.client = start(run_client, self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.terminate()
        self.server.terminate()
        self.server.join(10)
        self._engine_end.send("end")
        self.engine.join(10)


def start(target: Callable[..., None], *args: object) -> tuple[Connection, BaseProcess]:
    own, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    return own, process


# -- the client --


@dataclass(frozen=True)
class Sent:
    """What one load came to; CPU seconds by process."""

    num_requests: int
    num_tokens: int
    num_chunks: int
    """Arrivals of tokens; fewer than tokens where one of the processes was behind."""
    wall_s: float
    ttft_s: float
    longest_gap_p50_s: float
    longest_gap_p99_s: float
    cpu_s: dict[str, float]


def load(stack: Stack, num_requests: int, num_answer: int, num_open: int) -> Sent:
    """Send it from the client's process."""
    before = {"server": cpu_s(stack.server), "engine": cpu_s(stack.engine)}
    stack.client_end.send((num_requests, num_answer, num_open))
    sent: Sent = stack.client_end.recv()
    after = {"server": cpu_s(stack.server), "engine": cpu_s(stack.engine)}
    cpu = {name: after[name] - before[name] for name in after}
    return Sent(**{**vars(sent), "cpu_s": {**sent.cpu_s, **cpu}})


def cpu_s(process: BaseProcess) -> float:
    """User and system time of a process, in seconds."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def run_client(url: str, parent: Connection) -> None:
    """One load after the other, as asked for."""
    endpoint, _ = asyncio.run(find_endpoint(url))
    for number in count():
        num_requests, num_answer, num_open = parent.recv()
        items = [item(f"{os.getpid()}.{number}.{i}", num_answer) for i in range(num_requests)]
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            parent.send(runner.run(send(endpoint, items, num_open)))


def item(name: str, num_answer: int) -> WorkItem:
    return WorkItem(name, 0.0, num_answer, "default", "", (Segment(name, NUM_PROMPT),))


async def send(endpoint: Endpoint, items: list[WorkItem], num_open: int) -> Sent:
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    outcome = await run_load(
        endpoint, items, vocab_size=VOCABULARY, max_open=num_open, small_samples=True
    )
    wall_s, cpu = time.monotonic() - started_s, time.process_time() - started_cpu_s
    records = list(outcome.recorder.requests.values())
    assert outcome.state.num_done == len(items), outcome.state
    gaps = sorted(record.longest_gap_s or 0.0 for record in records)
    return Sent(
        len(items),
        outcome.state.num_tokens,
        len(outcome.recorder.steps),
        wall_s,
        statistics.median(record.ttft_s or 0.0 for record in records),
        gaps[len(gaps) // 2],
        gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        {"client": cpu},
    )


if __name__ == "__main__":
    main()
