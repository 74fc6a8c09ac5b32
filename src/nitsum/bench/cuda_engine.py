"""What the engine does on GPUs: decode, prefill and saturation, beside what the hardware allows.

Through the engine and worker processes in their default configuration, with random weights of the
checkpoint's shape. Tokens are timed where the engine hands them out. Each figure's floor is made of
bandwidth and matrix rate measured in the same run.

    decode   B requests at once; gaps between tokens while all of them decode
    prefill  one request on an idle engine; time to its first token
    load     many requests at once; output tokens per second
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Literal

from nitsum.bench.driver import Answer, Driver, Workers
from nitsum.bench.floor import kv_bytes, weight_bytes
from nitsum.bench.stages import OnStage
from nitsum.config import EngineConfig
from nitsum.kv.cache import ArenaShape
from nitsum.limits import STEP_LIMITS
from nitsum.metrics.records import Recorder
from nitsum.plan import Group, PlanSet, parse_plan
from nitsum.request import Request, SamplingParams
from nitsum.shape import ModelShape

NUM_DECODED = 96
"""Tokens of the sequence that starts last; the first and last gaps are left out."""
LONGEST_ANSWER = 4000
"""Nobody ends before the last one has started."""
NUM_PREFILLS = 7
COPY_BYTES = 2 << 30
MATRIX_SIZE = 8192


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Path
    tp: int = 1
    batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    prompts: tuple[int, ...] = (512, 1155, 2048, 4096)
    saturation: int = 0
    """Requests of 1,155 in and 211 out at once; 0 leaves it out."""
    context: int = 1024
    """Mean context of decode figures."""
    load_format: Literal["auto", "dummy"] = "dummy"
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """What this GPU reaches."""

    copy_bytes_per_s: float
    """Read and written."""
    matrix_flop_per_s: float
    """bfloat16."""


@dataclass
class Result:
    """Figures by name; `tp1` and the like are in the names."""

    figures: dict[str, float] = field(default_factory=dict[str, float])


def measure(options: Options, on_stage: OnStage, note: Callable[[str], None]) -> Result:
    """Everything, in one run."""
    shape = ModelShape.from_folder(options.model)
    on_stage("Measuring copies and products", 0, 1)
    limits = measure_limits()
    result = Result(
        {
            "copy_tb_per_s": limits.copy_bytes_per_s / 1e12,
            "matrix_tflop_per_s": limits.matrix_flop_per_s / 1e12,
        }
    )
    recorder = Recorder()
    started_s = time.monotonic()
    with Workers(engine_config(options), on_progress=note) as workers:
        result.figures["start_s"] = time.monotonic() - started_s
        _note_memory(result, workers)
        run = Run(options, shape, limits, workers, recorder)
        _measure_all(run, result, on_stage)
    return result


def _measure_all(run: Run, result: Result, on_stage: OnStage) -> None:
    options = run.options
    for number, num_tokens in enumerate(options.prompts):
        on_stage("Prefill", number, len(options.prompts))
        result.figures |= run.prefill(num_tokens)
    for number, batch in enumerate(options.batches):
        on_stage("Decode", number, len(options.batches))
        result.figures |= run.decode(batch)
    if options.saturation:
        on_stage("Saturation", 0, 1)
        result.figures |= run.saturate(options.saturation)


def _note_memory(result: Result, workers: Workers) -> None:
    ready = workers.ready[0]
    gib = {f"memory_{name}_gib": size / 2**30 for name, size in ready.memory_bytes.items()}
    phases = {f"start_{name}_s": seconds for name, seconds in ready.phases.items()}
    result.figures |= {**gib, **phases, "kv_tokens": float(kv_tokens(workers.arena))}


def kv_tokens(arena: ArenaShape) -> int:
    """That fit one lane over all ranks."""
    page_units = arena.page_units(Group(arena.num_ranks, 0))
    return arena.num_units // page_units * arena.block_tokens


def engine_config(options: Options) -> EngineConfig:
    """One lane over all ranks, room for the largest batch, everything else as by default."""
    plan = parse_plan(f"TP{options.tp}", options.tp)
    largest = max(*options.batches, min(options.saturation, 512), 1)
    return EngineConfig(
        model=str(options.model),
        plans=PlanSet(options.tp, (plan,), plan.name),
        device="cuda",
        dtype="bfloat16",
        load_format=options.load_format,
        block_tokens=STEP_LIMITS["cuda"].block_tokens,
        kv_bytes=0,
        max_model_len=8192,
        max_num_seqs=largest,
        max_batch_tokens=8192,
        prefix_cache=False,
        seed=options.seed,
    )


# --- what the hardware allows ------------------------------------------------------------------


def measure_limits() -> Limits:
    """Medians over several runs, on random numbers."""
    import torch

    src = torch.randn(COPY_BYTES // 4, device="cuda")
    copy_s = _time_on_device(torch.empty_like(src).copy_, src)
    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16)
    matrix_s = _time_on_device(torch.matmul, a, torch.randn_like(a))
    del src, a
    torch.cuda.empty_cache()
    return Limits(2 * COPY_BYTES / copy_s, 2 * MATRIX_SIZE**3 / matrix_s)


def _time_on_device(call: Callable[..., object], *args: object) -> float:
    import torch

    times: list[float] = []
    for _ in range(14):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*args)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[4:])


def decode_floor_s(
    options: Options, shape: ModelShape, limits: Limits, context_tokens: int
) -> float:
    """Weights, and KV of so many positions, read once, by all ranks together."""
    least = weight_bytes(shape, "bfloat16") + kv_bytes(shape, context_tokens, "bfloat16")
    return least / options.tp / limits.copy_bytes_per_s


def prefill_floor_s(options: Options, shape: ModelShape, limits: Limits, num_tokens: int) -> float:
    """Products of all layers, causal attention, and one row of logits."""
    vocab = shape.vocab_size * shape.hidden_size
    tables = vocab if shape.tie_embeddings else 2 * vocab
    products = 2 * num_tokens * (shape.num_params - tables) + 2 * vocab
    attention = 2 * num_tokens**2 * shape.num_q_heads * shape.head_dim * shape.num_layers
    return (products + attention) / options.tp / limits.matrix_flop_per_s


# --- measuring ---------------------------------------------------------------------------------


class TimedDriver(Driver):
    """A driver that says how long a turn of the engine took, waiting for workers left out."""

    def __init__(self, workers: Workers, recorder: Recorder) -> None:
        super().__init__(workers.config, workers, recorder, None)
        self._waited_s = 0.0

    def timed_turn(self) -> float:
        """One turn."""
        self._waited_s = 0.0
        started_s = time.perf_counter()
        self.turn()
        return time.perf_counter() - started_s - self._waited_s

    def _wait(self) -> None:
        started_s = time.perf_counter()
        super()._wait()
        self._waited_s = time.perf_counter() - started_s


class Run:
    """One engine, and what is asked of it."""

    def __init__(
        self,
        options: Options,
        shape: ModelShape,
        limits: Limits,
        workers: Workers,
        recorder: Recorder,
    ) -> None:
        self.options = options
        self._shape = shape
        self._limits = limits
        self._recorder = recorder
        self._driver = TimedDriver(workers, recorder)
        self._random = Random(options.seed)

    def prefill(self, num_tokens: int) -> dict[str, float]:
        """Time to the first token of a lone request."""
        times = [self._first_token_s(num_tokens) for _ in range(NUM_PREFILLS + 2)][2:]
        floor_s = prefill_floor_s(self.options, self._shape, self._limits, num_tokens)
        name = f"tp{self.options.tp}_{num_tokens}"
        median_s = statistics.median(times)
        return {
            f"prefill_ms_{name}": 1e3 * median_s,
            f"prefill_ms_worker_only_{name}": 1e3 * self._recorder.steps[-1].seconds,
            f"prefill_floor_ms_{name}": 1e3 * floor_s,
            f"prefill_over_floor_{name}": median_s / floor_s,
        }

    def _first_token_s(self, num_tokens: int) -> float:
        (request_id,) = self._submit(1, num_tokens, 1)
        started_s = time.monotonic()
        self._driver.run()
        return self._driver.answers[request_id].times_s[0] - started_s

    def decode(self, batch: int) -> dict[str, float]:
        """Gaps between tokens while all sequences decode; contexts are about `context`."""
        first_step = len(self._recorder.steps)
        ids = self._submit(batch, self.options.context - NUM_DECODED // 2, LONGEST_ANSWER)
        answers = [self._driver.answers[request_id] for request_id in ids]
        host_s = self._run_timed(answers)
        context = self.options.context - NUM_DECODED + sum(len(a.tokens) for a in answers) // batch
        last = min(answers, key=lambda answer: len(answer.tokens))
        gaps = [b - a for a, b in pairwise(last.times_s[8 : NUM_DECODED - 8])]
        for request_id in ids:
            self._driver.core.abort(request_id)
        self._driver.settle()
        steps = [
            step.seconds
            for step in self._recorder.steps[first_step:]
            if step.num_decode == batch and not step.prefill_tokens
        ]
        floor_s = decode_floor_s(self.options, self._shape, self._limits, batch * context)
        median_s = statistics.median(gaps)
        name = f"tp{self.options.tp}_b{batch}"
        return {
            f"decode_ms_{name}": 1e3 * median_s,
            f"decode_p99_ms_{name}": 1e3 * sorted(gaps)[int(0.99 * (len(gaps) - 1))],
            f"decode_ms_{name}_worker_only": 1e3 * statistics.median(steps),
            f"decode_context_tokens_{name}": context,
            f"decode_floor_ms_{name}": 1e3 * floor_s,
            f"decode_over_floor_{name}": median_s / floor_s,
            f"engine_host_ms_per_step_{name}": 1e3 * host_s,
        }

    def _run_timed(self, answers: list[Answer]) -> float:
        """Until the last sequence has `NUM_DECODED` tokens; median seconds of the engine's turns
        that ended a step while all decoded."""
        turns: list[float] = []
        while min(len(answer.tokens) for answer in answers) < NUM_DECODED:
            num_steps = len(self._recorder.steps)
            all_decode = all(answer.tokens for answer in answers)
            turn_s = self._driver.timed_turn()
            if all_decode and len(self._recorder.steps) > num_steps:
                turns.append(turn_s)
        return statistics.median(turns)

    def saturate(self, num_requests: int) -> dict[str, float]:
        """All at once, 1,155 tokens in and 211 out each."""
        started_s = time.monotonic()
        ids = self._submit(num_requests, 1155, 211)
        self._driver.run()
        took_s = time.monotonic() - started_s
        num_tokens = sum(len(self._driver.answers[i].tokens) for i in ids)
        assert num_tokens == 211 * num_requests, "an answer is incomplete"
        tp = self.options.tp
        return {
            f"saturation_output_tokens_per_s_tp{tp}": num_tokens / took_s,
            f"saturation_requests_per_s_tp{tp}": num_requests / took_s,
        }

    def _submit(self, num_requests: int, num_prompt: int, num_answer: int) -> list[str]:
        """Random prompts, greedy answers of a fixed length."""
        sampling = SamplingParams(max_tokens=num_answer, temperature=0.0)
        vocab = range(self._shape.vocab_size)
        ids = [f"r{len(self._driver.answers) + i}" for i in range(num_requests)]
        for request_id in ids:
            prompt = self._random.choices(vocab, k=num_prompt)
            now_s = time.monotonic()
            self._driver.submit(Request(request_id, prompt, sampling, arrival_s=now_s))
        return ids
