"""The decodes of a step: every sequence that is ready, unless loose ones must sit it out."""

from __future__ import annotations

from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING

from nitsum.sched import room
from nitsum.sched.composed import Composed
from nitsum.sched.targets import DELIVERY_S, LOOSEST, MARGIN, TIGHTEST
from nitsum.sequence import Sequence
from nitsum.step import EMPTY, BatchShape, Chunk, make_chunk

if TYPE_CHECKING:
    from nitsum.sched.lane import LaneScheduler

PREFILL_PART = 0.5
"""Part of the time tight decodes leave that loose ones leave to urgent prompts."""
MAX_SKIPS = 8
"""Steps a loose request may sit out in a row."""


def add_decodes(lane: LaneScheduler, step: Composed) -> list[list[Sequence]]:
    """Put every sequence in decode into the step; returns those with more to compute, by level."""
    prefills: list[list[Sequence]] = [[] for _ in lane.levels]
    context, most = 0, lane.num_seats
    for level in lane.levels:
        if lane.running[level]:
            num_before = len(step.chunks)
            context += _add_level(lane, step, level, prefills[level], most)
            step.tokens[level] = len(step.chunks) - num_before
    count = len(step.chunks)
    if step.preempted:
        _recount(lane, step)
        prefills = [[s for s in sequences if not step.has_lost(s)] for sequences in prefills]
    else:
        step.shape = BatchShape(count, context, 0, 0, count)
    if step.chunks:
        step.predicted_s = lane.step_time(step)
        if lane.rules.slack:
            _thin_out(lane, step, _has_pace(prefills))
    step.decodes, lane.decode_s = step.shape, step.predicted_s
    return prefills


def _has_pace(prefills: list[list[Sequence]]) -> bool:
    return any(s.pace_s is not None for sequences in prefills for s in sequences)


def _add_level(
    lane: LaneScheduler, step: Composed, level: int, prefills: list[Sequence], most: int
) -> int:
    """The decodes of one level; returns their context in tokens. This loop is the hot one."""
    block_tokens, start_s = lane.kv.arena.block_tokens, step.start_s
    chunks, preempted = step.chunks, step.preempted
    context, tight_s, next_due_s = 0, inf, inf
    for sequence in list(lane.running[level]):
        total = len(sequence.tokens) + sequence.num_sampling
        if total >= sequence.num_most:
            continue  # nothing left to draw
        start = sequence.num_dispatched
        if total - start != 1:
            if total - start > 1:
                prefills.append(sequence)
            continue
        # A block begins here; every other position lies in the block of the one before it.
        if not start % block_tokens and not _grow(lane, step, sequence, total):
            continue
        if len(chunks) >= most or (preempted and step.has_lost(sequence)):
            continue
        pace_s = sequence.pace_s
        if pace_s is not None:
            first_s = sequence.first_token_s
            if first_s is None:
                first_s = start_s  # the steps before this one draw it
            due_s = first_s + (total - sequence.num_prompt) * pace_s
            allowed_s = LOOSEST * pace_s
            if first_s <= sequence.missed_after_s:
                ahead_s = due_s - start_s - MARGIN * pace_s - DELIVERY_S
                if ahead_s < allowed_s:
                    allowed_s = max(ahead_s, TIGHTEST * pace_s)
            if allowed_s < tight_s:
                tight_s = allowed_s
            if due_s + pace_s < next_due_s:
                next_due_s = due_s + pace_s
        chunks.append(make_chunk((sequence, start, 1, True)))
        context += total
    step.tight_s[level] = tight_s
    step.next_due_s = min(step.next_due_s, next_due_s)
    return context


def _grow(lane: LaneScheduler, step: Composed, sequence: Sequence, num_tokens: int) -> bool:
    """A block for its next position; without one it makes way itself, unless peers read its KV."""
    if step.preempted and step.has_lost(sequence):
        return False
    if room.grow(lane, sequence, num_tokens, step):
        return True
    if not room.is_moving(lane.kv, sequence):
        room.yield_kv(lane, sequence, sequence, step)
    return False


def _recount(lane: LaneScheduler, step: Composed) -> None:
    """Somebody who was in the step had to leave it."""
    step.tokens = [0] * len(lane.levels)
    for chunk in step.chunks:
        step.tokens[lane.setting.level(chunk.sequence)] += 1
    count = len(step.chunks)
    step.shape = BatchShape(count, sum(c.start + 1 for c in step.chunks), 0, 0, count)


def _thin_out(lane: LaneScheduler, step: Composed, is_urgent: bool) -> None:
    """Leave out as many loose requests as it takes for the tight ones to keep their pace; with
    urgent prompts to compute, loose ones leave them half of the time that is to spare."""
    allowed_s, predicted_s = min(step.tight_s), step.predicted_s
    least_s = allowed_s
    if is_urgent and allowed_s < inf:  # what would be left of it if all were loose
        least_s -= PREFILL_PART * max(0.0, allowed_s - lane.shape_time(EMPTY))
    if allowed_s == inf or predicted_s <= least_s:
        lane.skipped.clear()
        return
    slack = [(_skip_slack_s(lane, step, chunk, predicted_s), chunk) for chunk in step.chunks]
    loose = [chunk for slack_s, chunk in sorted(slack, key=lambda entry: entry[0]) if slack_s > 0]
    if is_urgent:
        spare_s = allowed_s - _time_without(lane, step, loose)
        allowed_s -= PREFILL_PART * max(0.0, spare_s)
    count = _fewest(lane, step, loose, allowed_s)
    count = min(count, len(step.chunks) - 1)  # a step without decodes would help nobody
    left_out = {chunk.sequence for chunk in loose[len(loose) - count :]}
    lane.skipped = {s: lane.skipped.get(s, 0) + 1 for s in left_out}
    if left_out:
        step.chunks[:] = [chunk for chunk in step.chunks if chunk.sequence not in left_out]
        _recount(lane, step)
        step.predicted_s = lane.step_time(step)


def _skip_slack_s(lane: LaneScheduler, step: Composed, chunk: Chunk, predicted_s: float) -> float:
    """What is left of a request's slack if it sits this step out; 0 and less: it must not."""
    sequence = chunk.sequence
    if sequence.promoted or lane.skipped.get(sequence, 0) >= MAX_SKIPS:
        return 0.0
    if lane.shares.protects(lane.setting.level(sequence)):
        return 0.0
    if sequence.pace_s is None:
        return inf
    if sequence.first_token_s is None:
        return 0.0
    num_answered = chunk.start + 1 - sequence.num_prompt
    due_s = sequence.first_token_s + num_answered * sequence.pace_s
    return due_s - step.start_s - 2 * predicted_s - DELIVERY_S


def _time_without(lane: LaneScheduler, step: Composed, loose: list[Chunk]) -> float:
    count = step.shape.num_decode - len(loose)
    context = step.shape.decode_context_tokens - sum(chunk.start + 1 for chunk in loose)
    return lane.shape_time(BatchShape(count, context, 0, 0, count))


def _fewest(lane: LaneScheduler, step: Composed, loose: list[Chunk], allowed_s: float) -> int:
    """How many of the last loose chunks must go; all of them if that is not enough either."""
    decodes, context = step.shape.num_decode, step.shape.decode_context_tokens
    left = [0, *accumulate(chunk.start + 1 for chunk in reversed(loose))]
    low, high = 0, len(loose)
    while low < high:
        middle = (low + high) // 2
        num = decodes - middle
        shape = BatchShape(num, context - left[middle], 0, 0, num)
        if lane.shape_time(shape) <= allowed_s:
            high = middle
        else:
            low = middle + 1
    return low
