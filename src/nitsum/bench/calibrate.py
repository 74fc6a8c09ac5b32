"""Targets of a run, measured on the server that is to be held to them.

Lone prompts give the prefill times that TTFT targets multiply; a lone answer and a full batch give
the two TPOTs. Written to a file once, before the runs that are judged by it.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from nitsum.bench.load import LoadRun
from nitsum.bench.stream_client import Endpoint
from nitsum.errors import NitsumError
from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.metrics.targets import LARGE_BATCH, Targets, TierRule
from nitsum.workload.items import Segment, WorkItem

REPEATS = 3
_NUM_OUTPUT = 24
_LONGEST = 1 << 17
_CONTEXT = 1024


async def calibrate(
    endpoint: Endpoint,
    *,
    vocab_size: int,
    max_tokens: int,
    batch: int = LARGE_BATCH,
    on_stage: Callable[[str], None] = lambda _text: None,
) -> Targets:
    """Measure `endpoint`, which should serve nothing else meanwhile."""
    await _lone(endpoint, vocab_size, [16], "warm")  # first steps of a fresh server do not count
    lengths = prompt_lengths(max_tokens)
    lone: list[RequestRecord] = []
    for number in range(REPEATS):
        on_stage(f"prompts of {lengths[0]} to {lengths[-1]} tokens, alone ({number + 1}/{REPEATS})")
        lone += await _lone(endpoint, vocab_size, lengths, f"lone.{number}")
    prefill = [
        (length, median(r.ttft_s for r in lone if r.num_prompt == length and r.ttft_s is not None))
        for length in lengths
    ]
    tpots = [record.tpot_s for record in lone if record.tpot_s is not None]
    context = min(_CONTEXT, max_tokens - _NUM_OUTPUT)
    on_stage(f"{batch} answers at once, after {context} tokens each")
    full = await _together(endpoint, vocab_size, context, batch)
    return Targets(
        source=f"{endpoint.model} at {endpoint.url}, measured; batch of {batch} at {context}",
        prefill=_ascending(prefill),
        tiers={
            "priority": TierRule(k=3.0, tpot_s=1.5 * median(tpots)),
            "default": TierRule(k=10.0, tpot_s=full),
            "flex": TierRule(deadline_s=600.0),
            "batch": TierRule(deadline_s=1800.0),
        },
    )


def prompt_lengths(max_tokens: int) -> list[int]:
    """Powers of two from 16 up to what the context holds beside the answer."""
    longest = min(_LONGEST, max_tokens - _NUM_OUTPUT)
    lengths = [1 << bit for bit in range(4, 18) if 1 << bit <= longest]
    return lengths if len(lengths) > 1 else [max(1, longest // 2), longest]


def _ascending(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A longer prompt is never faster: measurement noise must not make it so."""
    result: list[tuple[int, float]] = []
    highest = 0.0
    for length, seconds in sorted(points):
        highest = max(highest, seconds)
        result.append((length, highest))
    return result


async def _lone(
    endpoint: Endpoint, vocab_size: int, lengths: list[int], name: str
) -> list[RequestRecord]:
    """One after the other."""
    records: list[RequestRecord] = []
    for i, length in enumerate(lengths):
        items = [_item(f"{name}.{i}.{length}", length, _NUM_OUTPUT)]
        records.extend(await _run(endpoint, vocab_size, items))
    return records


async def _together(endpoint: Endpoint, vocab_size: int, context: int, batch: int) -> float:
    """Mean TPOT with `batch` answers at once, seconds."""
    items = [_item(f"batch.{i}", context, _NUM_OUTPUT) for i in range(batch)]
    records = await _run(endpoint, vocab_size, items)
    return median(record.tpot_s for record in records if record.tpot_s is not None)


async def _run(endpoint: Endpoint, vocab_size: int, items: list[WorkItem]) -> list[RequestRecord]:
    recorder = Recorder()
    state = await LoadRun(endpoint, items, recorder, vocab_size=vocab_size).run()
    if state.num_done < len(items):
        kinds = ", ".join(state.errors) or "cut off"
        raise NitsumError(f"{len(items) - state.num_done} requests were not answered ({kinds}).")
    return list(recorder.requests.values())


def _item(request_id: str, num_prompt: int, num_output: int) -> WorkItem:
    return WorkItem(
        request_id=request_id,
        at_s=0.0,
        num_output=num_output,
        tier="priority",
        tenant="",
        segments=(Segment(request_id, num_prompt),),
    )
