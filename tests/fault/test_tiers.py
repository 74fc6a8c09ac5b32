"""What tiers promise, on a real server: judged by the engine's events and step counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from nitsum.events import (
    AnyEvent,
    Arrived,
    Displaced,
    Finished,
    Promoted,
    Refused,
    Resumed,
    Started,
    StepEnded,
    StepSent,
)
from nitsum.metrics.eventfile import read_events
from tests.fault.running import RunningServer

pytestmark = pytest.mark.fault

NUM_SLOTS = 2
MAX_WAIT_S = 1.5
SHARE = 0.25
TIERS = f"""
- {{name: priority, level: 0, ttft_s: 60, tpot_s: 10}}
- {{name: default, level: 1, ttft_s: 60, tpot_s: 10, max_wait_s: {MAX_WAIT_S}}}
- {{name: flex, level: 2, deadline_s: 600}}
- {{name: late, level: 3, deadline_s: 600, queue_timeout_s: 0.5}}
- {{name: batch, level: 4, deadline_s: 1800, min_share: {SHARE}}}
"""
Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(scope="module")
def ran(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One server, one scene after the other: answers by name, and the events of all."""
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "tiers.yaml").write_text(TIERS)
    flags = ("--ranks", "1", "--kv-memory", "32MiB", "--max-num-seqs", str(NUM_SLOTS))
    files = ("--tiers", str(folder / "tiers.yaml"), "--events", str(folder / "events.jsonl"))
    with RunningServer(checkpoint, folder, *flags, *files) as server:
        answers = asyncio.run(_scenes(server.url))
    return {**answers, "events": list(read_events(folder / "events.jsonl"))}


async def _scenes(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=240) as http:

        async def ask(tier: str, num_tokens: int) -> httpx.Response:
            body = {"prompt": "hello", "max_tokens": num_tokens, "ignore_eos": True}
            return await http.post("/v1/completions", json={**body, "service_tier": tier})

        async def running() -> int:
            state = (await http.get("/admin/state")).json()
            return sum(lane["num_running"] for lane in state["lanes"])

        return {"displaced": await _displace(ask, running), "endless": await _endless(ask)}


async def _displace(
    ask: Ask, running: Callable[[], Awaitable[int]]
) -> dict[str, list[httpx.Response]]:
    """Every slot is taken by flex work; then one priority request arrives."""
    flex = [asyncio.create_task(ask("flex", 800)) for _ in range(NUM_SLOTS)]
    while await running() < NUM_SLOTS:
        await asyncio.sleep(0.01)
    priority = await ask("priority", 5)
    return {"priority": [priority], "flex": list(await asyncio.gather(*flex))}


async def _endless(ask: Ask) -> dict[str, list[httpx.Response]]:
    """More priority work than there are slots, until all of the others have been answered."""
    is_over = asyncio.Event()

    async def again_and_again() -> None:
        while not is_over.is_set():
            await ask("priority", 40)

    crowd = [asyncio.create_task(again_and_again()) for _ in range(3 * NUM_SLOTS)]
    await asyncio.sleep(0.2)
    others = {"batch": [ask("batch", 150) for _ in range(3)], "default": [ask("default", 20)]}
    others["late"] = [ask("late", 20)]
    answers = await asyncio.gather(*(call for calls in others.values() for call in calls))
    is_over.set()
    await asyncio.gather(*crowd)
    return {"batch": answers[:3], "default": answers[3:4], "late": answers[4:]}


def of(events: list[AnyEvent], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def ids_of(answers: list[httpx.Response]) -> list[str]:
    """The engine's names of the requests."""
    return [f"{answer.json()['id']}-0" for answer in answers]


def test_priority_starts_in_the_next_step_and_displaced_work_goes_on(ran) -> None:
    events, answers = ran["events"], ran["displaced"]
    (urgent,) = ids_of(answers["priority"])
    at = next(i for i, e in enumerate(events) if isinstance(e, Arrived) and e.request_id == urgent)
    first_after = of(events[at:], StepSent)[0].step_id
    (started,) = [e for e in of(events, Started) if e.request_id == urgent]
    assert started.step_id == first_after
    displaced = [e for e in of(events, Displaced) if e.by_request_id == urgent]
    assert [e.step_id for e in displaced] == [first_after]
    victim = displaced[0].request_id
    flex = ids_of(answers["flex"])
    assert victim in flex
    resumed = [e for e in of(events, Resumed) if e.request_id == victim]
    assert [e.num_recomputed for e in resumed] == [0]
    assert all(answer.json()["usage"]["completion_tokens"] == 800 for answer in answers["flex"])
    ended = {e.request_id: e.reason for e in of(events, Finished)}
    assert [ended[request_id] for request_id in flex] == ["length"] * NUM_SLOTS


def test_the_lowest_tier_gets_its_share_under_endless_priority_load(ran) -> None:
    events, batch = ran["events"], ids_of(ran["endless"]["batch"])
    tiers = {e.request_id: e.tier for e in of(events, Arrived)}
    at = next(i for i, e in enumerate(events) if isinstance(e, Arrived) and e.tier == "batch")
    end = max(i for i, e in enumerate(events) if isinstance(e, Finished) and e.request_id in batch)
    counts: Counter[str] = Counter()
    for event in of(events[at:end], StepEnded):
        for request_id, num_tokens in event.tokens:
            counts[tiers[request_id]] += num_tokens
    assert counts["priority"] > counts["batch"] > 0
    assert counts["batch"] > 0.75 * SHARE * counts.total()


def test_nobody_waits_longer_than_the_bound(ran) -> None:
    """From the bound on, no step but one goes to others than it and the lowest tier, which may
    have all slots for the sake of its share."""
    events, (patient,) = ran["events"], ids_of(ran["endless"]["default"])
    assert [e.request_id for e in of(events, Promoted)] == [patient]
    (arrived,) = [e for e in of(events, Arrived) if e.request_id == patient]
    (started,) = [e for e in of(events, Started) if e.request_id == patient]
    bound_s = arrived.arrival_s + MAX_WAIT_S
    assert started.at_s >= bound_s
    tiers = {e.request_id: e.tier for e in of(events, Arrived)}
    served = {e.step_id: {tiers[name] for name, _ in e.tokens} for e in of(events, StepEnded)}
    late = [e for e in of(events, StepSent) if bound_s < e.at_s and e.step_id < started.step_id]
    assert len([e for e in late if served[e.step_id] != {"batch"}]) <= 1


def test_a_queue_timeout_is_a_refusal(ran) -> None:
    (answer,) = ran["endless"]["late"]
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_timeout"
    (refused,) = of(ran["events"], Refused)
    assert (refused.tier, refused.code) == ("late", "queue_timeout")
    assert refused.request_id not in {e.request_id for e in of(ran["events"], Finished)}
