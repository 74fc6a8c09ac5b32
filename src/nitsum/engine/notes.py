"""What the core tells the event stream of requests and steps."""

from __future__ import annotations

from nitsum.engine.lanes import StepInFlight
from nitsum.events import (
    Arrived,
    Displaced,
    EventSink,
    Preempted,
    Promoted,
    Resumed,
    StepSent,
)
from nitsum.request import Request
from nitsum.sched.composed import Composed
from nitsum.tier import Tier


def emit_arrived(
    sink: EventSink, request: Request, tier: Tier, at_s: float, chain_deadline_s: float | None
) -> None:
    sink.emit(
        Arrived(
            at_s=at_s,
            request_id=request.request_id,
            tier_asked=request.tier_asked,
            tier=request.tier,
            tenant=request.tenant,
            num_prompt=len(request.prompt),
            max_tokens=request.sampling.max_tokens,
            arrival_s=request.arrival_s,
            ttft_target_s=request.ttft_target_s or tier.ttft_s,
            tpot_target_s=request.tpot_target_s or tier.tpot_s,
            deadline_s=tier.deadline_s,
            chain_id=request.chain_id,
            chain_deadline_s=chain_deadline_s,
        )
    )


def emit_sent(sink: EventSink, step: StepInFlight) -> None:
    shape = step.shape
    sink.emit(
        StepSent(
            at_s=step.sent_s,
            step_id=step.step_id,
            group=step.loop.group,
            num_decode=shape.num_decode,
            prefill_tokens=shape.prefill_tokens,
            context_tokens=shape.decode_context_tokens + shape.prefill_context_tokens,
            predicted_s=step.predicted_s,
        )
    )


def note_changes(sink: EventSink, composed: Composed, step_id: int) -> None:
    """What composing a step did to other sequences."""
    _note_displaced(sink, composed, step_id)
    _note_preempted(sink, composed, step_id)
    for sequence in composed.promoted:
        sink.emit(
            Promoted(
                at_s=composed.now,
                request_id=sequence.request_id,
                tier=sequence.tier,
                waited_s=sequence.waited_s,
            )
        )
    for sequence, num_recomputed, _ in composed.resumed:
        sink.emit(
            Resumed(
                at_s=composed.now,
                request_id=sequence.request_id,
                step_id=step_id,
                num_recomputed=num_recomputed,
            )
        )


def _note_displaced(sink: EventSink, composed: Composed, step_id: int) -> None:
    for victim, favoured in composed.displaced:
        sink.emit(
            Displaced(
                at_s=composed.now,
                request_id=victim.request_id,
                tier=victim.tier,
                by_request_id=favoured.request_id,
                by_tier=favoured.tier,
                step_id=step_id,
            )
        )


def _note_preempted(sink: EventSink, composed: Composed, step_id: int) -> None:
    for sequence, by, kept in composed.preempted:
        sink.emit(
            Preempted(
                at_s=composed.now,
                request_id=sequence.request_id,
                tier=sequence.tier,
                by_request_id=by.request_id,
                by_tier=by.tier,
                step_id=step_id,
                kept=kept,
            )
        )
