"""Decode speed of one worker through the engine, beside `transformers` and beside the floor.

Both sides get the same prompts and lengths, the same threads and float32, turn by turn: ours,
theirs, ours, ... The first round warms up and is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from nitsum.bench.driver import Driver, Workers
from nitsum.bench.floor import kv_bytes, memory_bandwidth, weight_bytes
from nitsum.bench.reference import HfModel
from nitsum.bench.stages import OnStage
from nitsum.config import EngineConfig
from nitsum.metrics.records import Recorder
from nitsum.plan import default_plans
from nitsum.request import Request, SamplingParams
from nitsum.shape import ModelShape


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Path
    device: Literal["cpu"] = "cpu"
    batches: tuple[int, ...] = (1, 8)
    num_threads: int = 1
    num_prompt: int = 32
    num_answer: int = 64
    num_rounds: int = 5
    """Measured rounds; one more is run first."""
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """One generation of a batch."""

    first_s: float
    """Until every sequence had its first token."""
    decode_s: float
    """From there to the last token of all."""
    num_decoded: int
    """Tokens of the batch after the first ones."""

    @property
    def tokens_per_s(self) -> float:
        """While decoding."""
        return self.num_decoded / self.decode_s

    @property
    def whole_s(self) -> float:
        """From the prompts to the last token."""
        return self.first_s + self.decode_s


@dataclass
class Batch:
    """One batch size: a timing of each side per round, and what no machine can beat."""

    size: int
    floor_ms: float
    num_steps: int
    ours: list[Timing] = field(default_factory=list[Timing])
    theirs: list[Timing] = field(default_factory=list[Timing])
    worker_s: list[float] = field(default_factory=list[float])
    """Decode steps of the whole batch, inside the worker."""

    @property
    def vs_transformers(self) -> float:
        """Whole answers: median over rounds of their time / ours."""
        return self._ratio(lambda timing: timing.whole_s)

    def _ratio(self, seconds: Callable[[Timing], float]) -> float:
        pairs = zip(self.ours, self.theirs, strict=True)
        return statistics.median(seconds(b) / seconds(a) for a, b in pairs)

    @property
    def worker_ms(self) -> float:
        """Median step inside the worker."""
        return 1e3 * statistics.median(self.worker_s)

    def decode_ms(self, timings: list[Timing]) -> float:
        """Median time of a decode step."""
        return 1e3 * statistics.median(timing.decode_s for timing in timings) / self.num_steps

    def figures(self) -> dict[str, float]:
        figures = {
            "vs_transformers": self.vs_transformers,
            "vs_transformers_decode": self._ratio(lambda timing: timing.decode_s),
            "vs_transformers_ttft": self._ratio(lambda timing: timing.first_s),
            "decode_ms": self.decode_ms(self.ours),
            "decode_ms_worker_only": self.worker_ms,
            "transformers_decode_ms": self.decode_ms(self.theirs),
            "floor_ms": self.floor_ms,
            "decode_tokens_per_s": rate(self.ours),
            "transformers_decode_tokens_per_s": rate(self.theirs),
            "ttft_ms": 1e3 * statistics.median(timing.first_s for timing in self.ours),
            "transformers_ttft_ms": 1e3 * statistics.median(t.first_s for t in self.theirs),
            "spread_share": spread(self.ours),
            "transformers_spread_share": spread(self.theirs),
        }
        return {_with_batch(name, self.size): value for name, value in figures.items()}


def _with_batch(name: str, size: int) -> str:
    """`decode_ms_worker_only` keeps its ending: it says where the figure was taken."""
    stem, suffix = (name, "") if not name.endswith("_worker_only") else (name[:-12], "_worker_only")
    return f"{stem}_b{size}{suffix}"


def rate(timings: list[Timing]) -> float:
    """Median tokens/s."""
    return statistics.median(timing.tokens_per_s for timing in timings)


def spread(timings: list[Timing]) -> float:
    """(fastest - slowest) / median."""
    rates = [timing.tokens_per_s for timing in timings]
    return (max(rates) - min(rates)) / statistics.median(rates)


@dataclass
class Result:
    bandwidth: float
    """Of memory, bytes/s."""
    weight_bytes: int
    batches: list[Batch]

    def figures(self) -> dict[str, float]:
        figures = {
            "memory_gb_per_s": self.bandwidth / 1e9,
            "weights_read_mb": self.weight_bytes / 1e6,
        }
        for batch in self.batches:
            figures |= batch.figures()
        return figures


def measure(options: Options, on_stage: OnStage, note: Callable[[str], None]) -> Result:
    """Everything, in one run."""
    shape = ModelShape.from_folder(options.model)
    on_stage("Measuring memory", 0, 1)
    bandwidth = memory_bandwidth(options.num_threads)
    weights = weight_bytes(shape, "float32")
    theirs = HfGenerator(options.model, options.num_threads)
    recorder = Recorder()
    with Workers(engine_config(options, shape), on_progress=note) as workers:
        driver = workers.driver(sink=recorder)
        batches = [
            _measure_batch(options, size, shape, bandwidth, driver, recorder, theirs, on_stage)
            for size in options.batches
        ]
    return Result(bandwidth, weights, batches)


def engine_config(options: Options, shape: ModelShape) -> EngineConfig:
    """One rank in its default configuration, with room for the largest batch."""
    largest = max(options.batches)
    num_tokens = options.num_prompt + options.num_answer
    return EngineConfig(
        model=str(options.model),
        plans=default_plans(1),
        device=options.device,
        kv_bytes=4 * largest * kv_bytes(shape, num_tokens + 16, "float32"),
        max_model_len=num_tokens,
        max_num_seqs=max(64, largest),
        max_batch_tokens=max(512, largest * options.num_prompt),
        num_threads=options.num_threads,
    )


def _measure_batch(
    options: Options,
    size: int,
    shape: ModelShape,
    bandwidth: float,
    driver: Driver,
    recorder: Recorder,
    theirs: HfGenerator,
    on_stage: OnStage,
) -> Batch:
    """Rounds of both sides in turn; prompts are new in each round, so that no prefix is cached."""
    context = size * (options.num_prompt + options.num_answer // 2)
    least_bytes = weight_bytes(shape, "float32") + kv_bytes(shape, context, "float32")
    batch = Batch(size, 1e3 * least_bytes / bandwidth, options.num_answer - 1)
    for number in range(options.num_rounds + 1):
        on_stage(f"Batch {size}", number, options.num_rounds + 1)
        prompts = make_prompts(options, shape.vocab_size, size, number)
        first_step = len(recorder.steps)
        ours = run_ours(driver, prompts, options.num_answer)
        other = theirs.run(prompts, options.num_answer)
        if number:
            batch.ours.append(ours)
            batch.theirs.append(other)
            batch.worker_s += _worker_s(recorder, first_step, size)
    return batch


def make_prompts(options: Options, vocab_size: int, size: int, number: int) -> list[list[int]]:
    """`size` prompts of random tokens, others for each round."""
    random = Random(f"{options.seed} {size} {number}")
    return [random.choices(range(vocab_size), k=options.num_prompt) for _ in range(size)]


def _worker_s(recorder: Recorder, first_step: int, size: int) -> list[float]:
    """Decode steps of the whole batch, of those recorded since `first_step`."""
    steps = recorder.steps[first_step:]
    return [s.seconds for s in steps if s.num_decode == size and not s.prefill_tokens]


def run_ours(driver: Driver, prompts: list[list[int]], num_answer: int) -> Timing:
    """All prompts at once, greedily, through the engine."""
    sampling = SamplingParams(max_tokens=num_answer, temperature=0.0)
    started_s = time.monotonic()
    ids = [f"r{len(driver.answers) + index}" for index in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts, strict=True):
        driver.submit(Request(request_id, prompt, sampling, arrival_s=started_s))
    driver.run()
    answers = [driver.answers[request_id] for request_id in ids]
    assert all(len(answer.tokens) == num_answer for answer in answers), "an answer is incomplete"
    first_s = max(answer.times_s[0] for answer in answers)
    last_s = max(answer.times_s[-1] for answer in answers)
    return Timing(first_s - started_s, last_s - first_s, len(prompts) * (num_answer - 1))


class HfGenerator:
    """`transformers`' own `generate` on the same weights."""

    def __init__(self, model: Path, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._model = HfModel(model).model

    def run(self, prompts: list[list[int]], num_answer: int) -> Timing:
        """All prompts as one batch, greedily, to the full length."""
        import torch

        tokens = torch.tensor(prompts)
        times = _Times()
        started_s = time.monotonic()
        with torch.inference_mode():
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_answer,
                min_new_tokens=num_answer,
                do_sample=False,
                pad_token_id=0,
                streamer=times,
            )
        first_s, last_s = times.times_s[1], times.times_s[-1]
        return Timing(first_s - started_s, last_s - first_s, len(prompts) * (num_answer - 1))


class _Times:
    """A `transformers` streamer that notes when tokens come: first the prompt, then each step."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        self.times_s.append(time.monotonic())

    def end(self) -> None:
        pass
