"""Event streams with known answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nitsum.events import (
    AnyEvent,
    Arrived,
    Finished,
    Started,
    StepEnded,
    StepSent,
    SwitchEnded,
    SwitchStarted,
    WaveCommitted,
    WaveProposed,
)
from nitsum.plan import Group

TP1, TP2 = Group(1, 0), Group(2, 0)


def arrived(request_id: str, at_s: float, **fields: Any) -> Arrived:
    known: dict[str, Any] = {
        "tier_asked": "default",
        "tier": "default",
        "tenant": "acme",
        "num_prompt": 100,
        "max_tokens": 10,
        "arrival_s": at_s,
    }
    return Arrived(at_s=at_s, request_id=request_id, **(known | fields))


_step_ids = iter(range(1, 10**9))


def step(
    at_s: float, *request_ids: str, group: Group = TP1, seconds: float = 0.01, **sent: Any
) -> list[AnyEvent]:
    """A step that ended `at_s` and gave each request a token."""
    step_id = next(_step_ids)
    known: dict[str, Any] = {
        "num_decode": len(request_ids),
        "prefill_tokens": 0,
        "context_tokens": 0,
    }
    return [
        StepSent(at_s=at_s - seconds, step_id=step_id, group=group, **(known | sent)),
        StepEnded(
            at_s=at_s,
            step_id=step_id,
            group=group,
            seconds=seconds,
            tokens=[(request_id, 1) for request_id in request_ids],
        ),
    ]


def finished(request_id: str, at_s: float, tier: str = "default", **fields: Any) -> Finished:
    known: dict[str, Any] = {"reason": "length", "num_output": 0, "num_cached": 0, "group": TP1}
    return Finished(at_s=at_s, request_id=request_id, tier=tier, **(known | fields))


def life(
    request_id: str,
    arrival_s: float,
    tokens_s: Sequence[float],
    *,
    start_s: float | None = None,
    **fields: Any,
) -> list[AnyEvent]:
    """Arrival, start, a step per token, and the end with the last one."""
    started_s = arrival_s if start_s is None else start_s
    tier = fields.get("tier", "default")
    events: list[AnyEvent] = [
        arrived(request_id, arrival_s, **fields),
        Started(at_s=started_s, request_id=request_id, group=TP1, step_id=0, num_cached=0),
    ]
    for at_s in tokens_s:
        events.extend(step(at_s, request_id))
    return [*events, finished(request_id, tokens_s[-1], tier)]


def switch(
    op_id: str,
    plans: tuple[str, str],
    waves: Sequence[tuple[float, float, Sequence[str]]],
    bytes_moved: int = 1000,
) -> list[AnyEvent]:
    """A switch whose waves are (proposed, committed, moved requests)."""
    start_s, end_s = waves[0][0], waves[-1][1]
    events: list[AnyEvent] = [
        SwitchStarted(
            at_s=start_s, op_id=op_id, from_plan=plans[0], to_plan=plans[1], reason="test"
        )
    ]
    for number, (proposed_s, committed_s, moved) in enumerate(waves):
        ids = list(moved)
        events.append(
            WaveProposed(at_s=proposed_s, op_id=op_id, wave=number, request_ids=ids, num_units=1)
        )
        events.append(
            WaveCommitted(
                at_s=committed_s, op_id=op_id, wave=number, request_ids=ids, bytes_moved=bytes_moved
            )
        )
    events.append(
        SwitchEnded(
            at_s=end_s,
            op_id=op_id,
            from_plan=plans[0],
            to_plan=plans[1],
            ok=True,
            message="",
            duration_s=end_s - start_s,
            bytes_moved=bytes_moved * len(waves),
            num_left_behind=0,
        )
    )
    return events


def in_order(*parts: Sequence[AnyEvent]) -> list[AnyEvent]:
    """Merged by time; events of the same time keep their order."""
    return sorted((event for part in parts for event in part), key=lambda event: event.at_s)
