"""One server, one workload, one report: what `nitsum bench serve` runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from nitsum.bench.canary import take_canaries
from nitsum.bench.load import MAX_OPEN, LoadRun, LoadState, Progress
from nitsum.bench.stream_client import Endpoint
from nitsum.errors import NitsumError
from nitsum.events import BothSinks
from nitsum.metrics.eventfile import EventFile
from nitsum.metrics.records import Recorder
from nitsum.metrics.report import Report, build_report
from nitsum.metrics.targets import Target, Targets, promised, promised_words
from nitsum.workload.items import WorkItem

LATE_S = 0.1
"""A generator that sends later than this measures itself; the report says so."""
_DEFAULT_WORDS = (
    f"what tiers promise by default ({promised_words()}); measure your own with `nitsum bench "
    "serve --calibrate TARGETS.json`, and judge by them with --targets"
)


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    report: Report
    recorder: Recorder
    state: LoadState


async def find_endpoint(
    url: str, model: str = "", api_key: str | None = None, *, sends_tiers: bool = True
) -> tuple[Endpoint, int]:
    """The server's model (the first it lists unless named) and its context length, 0 if unsaid."""
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.get(f"{url}/v1/models", headers=headers)
            answer.raise_for_status()
    except httpx.HTTPError as error:
        raise NitsumError(f"No OpenAI-compatible server answers at {url}: {error}.") from None
    models = answer.json()["data"]
    chosen = next((entry for entry in models if model in ("", entry["id"])), None)
    if chosen is None:
        known = ", ".join(entry["id"] for entry in models)
        raise NitsumError(f"{url} does not serve {model!r}. It serves: {known}.")
    endpoint = Endpoint(url, chosen["id"], api_key, sends_tiers)
    return endpoint, int(chosen.get("max_model_len") or 0)


async def run_load(
    endpoint: Endpoint,
    items: Iterable[WorkItem],
    *,
    vocab_size: int,
    targets: Targets | None = None,
    warmup_s: float = 0.0,
    events: Path | None = None,
    on_progress: Progress | None = None,
    small_samples: bool = False,
    max_open: int = MAX_OPEN,
    drain_s: float | None = None,
) -> Outcome:
    """Send `items`, record what comes back, judge it by `targets`; `drain_s` as `LoadRun` has it.

    Without targets it is judged by what tiers promise by default, whatever the server promises and
    whether or not it knows tiers, so that all servers are judged alike; the server is not told.
    Canaries (`bench/canary.py`) load the server but are reported apart, in the notes.
    """

    def target_of(item: WorkItem) -> Target:
        return targets.of(item.tier, item.num_prompt) if targets else promised(item.tier)

    recorder = Recorder()
    with EventFile(events) if events is not None else nullcontext() as file:
        run = LoadRun(
            endpoint,
            items,
            recorder if file is None else BothSinks(recorder, file),
            vocab_size=vocab_size,
            target_of=target_of,
            tells_targets=targets is not None,
            max_open=max_open,
            drain_s=drain_s,
        )
        state = await run.run(on_progress)
    canaries = take_canaries(recorder)
    report = build_report(
        recorder,
        targets=targets,
        warmup_s=warmup_s,
        small_samples=small_samples,
        own_words=_DEFAULT_WORDS,
    )
    notes = [*report.notes, *_generator_notes(state), *canaries]
    return Outcome(msgspec.structs.replace(report, notes=notes), recorder, state)


def _generator_notes(state: LoadState) -> list[str]:
    notes: list[str] = []
    if state.max_late_s > LATE_S:
        notes.append(
            f"the generator itself was up to {state.max_late_s:.2f} s late; it shared its cores, "
            "or the load is beyond one process"
        )
    if state.errors:
        kinds = ", ".join(f"{name}: {count}" for name, count in sorted(state.errors.items()))
        notes.append(f"errors by kind: {kinds}")
    return notes
