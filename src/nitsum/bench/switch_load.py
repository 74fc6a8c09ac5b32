"""The load under which `nitsum bench switch` switches: streams, and what fills the arena."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from nitsum.bench.scenario import with_static
from nitsum.config import EngineConfig
from nitsum.limits import StepLimits, step_limits
from nitsum.messages import Device, Dtype
from nitsum.plan import PlanSet
from nitsum.request import Request, SamplingParams
from nitsum.shape import Geometry, ModelShape, round_up
from nitsum.shared import DTYPE_BYTES
from nitsum.tier import Tier

NUM_BACKGROUND = 12
"""Active at once where cached prefixes fill the arena: so many that every step of every lane takes
prompts on, and gaps are alike but for the switch."""

TIERS = (
    Tier("priority", 0, deadline_s=1e6, max_wait_s=1e6),
    Tier("batch", 1, deadline_s=1e6, max_wait_s=1e6),
)


Fill = Literal["requests", "cache"]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Path
    plans: PlanSet
    device: Device = "cpu"
    dtype: Dtype = "float32"
    load_format: Literal["auto", "dummy"] = "auto"
    fill: Fill = "requests"
    """What fills the arena: requests, so that every wave has to wait for room, or cached prefixes,
    as on a server that has been up for a while."""
    kv_bytes: int | None = None
    """Of a rank's arena; None: made for the streams, 0: all there is."""
    max_batch_tokens: int = 0
    """0: a multiple of the streams."""
    num_each_way: int = 20
    num_streams: int = 8
    num_prompt: int = 32
    num_answer: int = 160
    """Of a stream; when one ends the next begins."""
    block_tokens: int = 0
    """0: as the device has them."""
    seed: int = 0

    @property
    def limits(self) -> StepLimits:
        return step_limits(self.device, block_tokens=self.block_tokens)

    @property
    def num_switches(self) -> int:
        num_plans = len(self.plans.plans)
        return self.num_each_way * num_plans * (num_plans - 1)


def engine_config(options: Options) -> EngineConfig:
    """Unless told otherwise, all streams at their longest would take two thirds of the arenas."""
    shape = ModelShape.from_folder(options.model)
    plans = with_static(options.plans)
    geometry = Geometry(shape, plans.max_tp)
    block_tokens = options.limits.block_tokens
    blocks = -(-(options.num_prompt + options.num_answer) // block_tokens)
    blocks_per_rank = -(-3 * options.num_streams * blocks // (2 * plans.num_ranks))
    units = round_up(blocks_per_rank * geometry.units_per_page(1), geometry.num_units)
    unit_bytes = geometry.unit_bytes(block_tokens, DTYPE_BYTES[options.dtype])
    return EngineConfig(
        model=str(options.model),
        plans=plans,
        device=options.device,
        dtype=options.dtype,
        load_format=options.load_format,
        kv_bytes=units * unit_bytes if options.kv_bytes is None else options.kv_bytes,
        block_tokens=block_tokens,
        max_model_len=options.num_prompt + options.num_answer,
        max_num_seqs=4 * options.num_streams,
        max_batch_tokens=options.max_batch_tokens or max(64, 4 * options.num_streams),
        tiers=TIERS,
        timeout_s=120.0,
    )


def stream_prompts(options: Options, vocab_size: int) -> Iterator[Request]:
    random = Random(options.seed)
    for number in itertools.count():
        # Of different lengths, so that they do not all end, and leave the arena empty, together.
        num_answer = random.randint(options.num_answer // 2, options.num_answer)
        sampling = SamplingParams(max_tokens=num_answer, temperature=0.0)
        prompt = random.choices(range(vocab_size), k=options.num_prompt)
        yield Request(f"s{number}", prompt, sampling, tier="priority", tier_asked="priority")


def background(options: Options, vocab_size: int) -> Iterator[Request]:
    """Prompts of all lengths, which fill the gaps, half of them with one of two common prefixes; or
    long ones with short answers, which leave much behind in the cache."""
    random = Random(options.seed + 1)
    block = options.limits.block_tokens
    if options.fill == "cache":
        yield from _long_prompts(options, vocab_size, random)
    prefixes = [random.choices(range(vocab_size), k=block) for _ in range(2)]
    for number in itertools.count():
        prefix = random.choice(prefixes) if random.random() < 0.5 else []
        tail = random.choices(range(vocab_size), k=random.randint(1, 5 * block))
        sampling = SamplingParams(max_tokens=random.randint(block // 2, 2 * block), seed=number)
        yield Request(f"b{number}", prefix + tail, sampling, tier="batch", tier_asked="batch")


def _long_prompts(options: Options, vocab_size: int, random: Random) -> Iterator[Request]:
    longest = options.num_prompt + options.num_answer
    for number in itertools.count():
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        prompt = random.choices(range(vocab_size), k=random.randint(longest // 2, longest - 4))
        yield Request(f"b{number}", prompt, sampling, tier="batch", tier_asked="batch")
