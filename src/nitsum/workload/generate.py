"""From a mix to the work items it stands for. Same mix, same items, on every machine."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from pathlib import Path

from nitsum.workload.arrivals import RateStep, client_arrivals, warp
from nitsum.workload.items import CallScript, Chain, Segment, WorkItem
from nitsum.workload.lengths import Lengths
from nitsum.workload.spec import ChainSpec, MixSpec, StreamSpec, lengths_of
from nitsum.workload.traces import MOONCAKE_BLOCK_TOKENS, TraceRow, read_trace, sped_up, window


def generate(spec: MixSpec) -> Iterator[WorkItem]:
    """All items that arrive by themselves, in order of time; a chain's later calls follow from it.

    Raises `ConfigError` while it runs when a trace is bad.
    """
    streams = [_stream_items(spec, stream) for stream in spec.streams]
    return heapq.merge(*streams, key=lambda item: item.at_s)


def _stream_items(spec: MixSpec, stream: StreamSpec) -> Iterator[WorkItem]:
    if stream.trace is not None:
        return _replay(spec, stream, Path(stream.trace))
    return _synthesise(spec, stream)


class _Draw:
    """The random choices of one stream, each purpose with a random stream of its own."""

    def __init__(self, spec: MixSpec, stream: StreamSpec) -> None:
        seed = f"{spec.seed}/{stream.name}"
        self.seed = seed
        self.lengths = random.Random(f"{seed}/lengths")
        self.chains = random.Random(f"{seed}/chains")
        self._tiers = random.Random(f"{seed}/tiers")
        self._tenants = random.Random(f"{seed}/tenants")
        self._stream = stream

    def tier(self) -> str:
        return _weighted(self._tiers, self._stream.tiers)

    def tenant(self, client: int) -> str:
        if self._stream.tenants:
            return _weighted(self._tenants, self._stream.tenants)
        return f"{self._stream.name}-{client}"


def _weighted(rng: random.Random, weights: dict[str, float]) -> str:
    if len(weights) == 1:
        return next(iter(weights))
    return rng.choices(list(weights), list(weights.values()))[0]


# --- synthetic ------------------------------------------------------------------------------------


def _synthesise(spec: MixSpec, stream: StreamSpec) -> Iterator[WorkItem]:
    draw, lengths = _Draw(spec, stream), lengths_of(stream)
    arrivals = client_arrivals(
        draw.seed,
        stream.rate_per_s or 0.0,
        cv=stream.cv,
        num_clients=stream.clients,
        skew=stream.skew,
    )
    timed = warp(arrivals, rate_steps(spec, stream.name), spec.duration_s)
    for number, (at_s, client) in enumerate(timed):
        yield _item(spec, stream, lengths, draw, number, at_s, client)


def rate_steps(spec: MixSpec, stream: str) -> list[RateStep]:
    """How a stream's rate changes over the phases, from 0 on."""
    steps = [RateStep(phase.at_s, phase.rates.get(stream, 1.0)) for phase in spec.phases]
    return steps if steps and steps[0].at_s == 0.0 else [RateStep(0.0, 1.0), *steps]


def _item(
    spec: MixSpec,
    stream: StreamSpec,
    lengths: Lengths,
    draw: _Draw,
    number: int,
    at_s: float,
    client: int,
) -> WorkItem:
    tier, tenant = draw.tier(), draw.tenant(client)
    num_prompt, num_output = _fitted(
        lengths.prompt.draw(draw.lengths), lengths.output.draw(draw.lengths), spec.max_total_tokens
    )
    name = f"{stream.name}-{number}"
    chain = _chain(spec, stream.chain, lengths, draw, name, (num_prompt, num_output))
    return WorkItem(
        request_id=f"{name}.0" if chain else name,
        at_s=at_s,
        num_output=num_output,
        tier=tier,
        tenant=tenant,
        segments=_prompt_segments(draw.seed, stream, tenant, name, num_prompt),
        chain=chain,
        chain_start_s=at_s,
    )


def _fitted(num_prompt: int, num_output: int, limit: int) -> tuple[int, int]:
    """Cut to `limit` tokens in all: the answer to half of it at most, then the prompt."""
    if limit == 0 or num_prompt + num_output <= limit:
        return num_prompt, num_output
    num_output = min(num_output, max(1, limit // 2))
    return min(num_prompt, limit - num_output), num_output


def _prompt_segments(
    seed: str, stream: StreamSpec, tenant: str, name: str, num_prompt: int
) -> tuple[Segment, ...]:
    """The tenant's system prompt, then tokens nobody else has."""
    shared = min(stream.shared_prefix_tokens, num_prompt - 1)
    own = Segment(f"{seed}/{name}", num_prompt - shared)
    return (Segment(f"{seed}/system/{tenant}", shared, shared=True), own) if shared else (own,)


def _chain(
    spec: MixSpec,
    chain: ChainSpec | None,
    lengths: Lengths,
    draw: _Draw,
    name: str,
    first: tuple[int, int],
) -> Chain | None:
    """The script of a chain whose first call has `first` prompt and answer tokens."""
    if chain is None:
        return None
    rng = draw.chains
    calls = [CallScript(*first, think_s=0.0)]
    total = sum(first)
    for _ in range(rng.randint(*chain.calls) - 1):
        num_new, num_output = rng.randint(*chain.new_tokens), lengths.output.draw(rng)
        think_s = rng.expovariate(1.0 / chain.think_s) if chain.think_s else 0.0
        total += num_new + num_output
        if spec.max_total_tokens and total > spec.max_total_tokens:
            break
        calls.append(CallScript(num_new, num_output, think_s))
    return Chain(name, tuple(calls), chain.deadline_s)


# --- replayed -------------------------------------------------------------------------------------


def _replay(spec: MixSpec, stream: StreamSpec, path: Path) -> Iterator[WorkItem]:
    draw = _Draw(spec, stream)
    rows = sped_up(read_trace(path), stream.speed)
    for number, row in enumerate(window(rows, stream.start_s / stream.speed, spec.duration_s)):
        name = f"{stream.name}-{number}"
        scale = stream.length_scale
        num_prompt, num_output = _fitted(
            max(1, round(row.num_prompt * scale)),
            max(1, round(row.num_output * scale)),
            spec.max_total_tokens,
        )
        yield WorkItem(
            request_id=name,
            at_s=row.at_s,
            num_output=num_output,
            tier=draw.tier(),
            tenant=draw.tenant(number % stream.clients),
            segments=_replay_segments(draw.seed, name, row, num_prompt, scale),
        )


def _replay_segments(
    seed: str, name: str, row: TraceRow, num_prompt: int, scale: float
) -> tuple[Segment, ...]:
    """Blocks with a hash get the hash's tokens, so that the trace's shared prefixes are shared."""
    block = max(1, round(MOONCAKE_BLOCK_TOKENS * scale))
    segments: list[Segment] = []
    rest = num_prompt
    for prefix_hash in row.prefix_hashes:
        num_tokens = min(rest, block)
        if num_tokens:
            segments.append(Segment(f"{seed}/block/{prefix_hash}", num_tokens, shared=True))
        rest -= num_tokens
    return (*segments, Segment(f"{seed}/{name}", rest)) if rest else tuple(segments)
