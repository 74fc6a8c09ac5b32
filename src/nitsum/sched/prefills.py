"""The prompts of a step: chunks after its decodes, as large as slack allows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from math import ceil, inf
from typing import TYPE_CHECKING

from nitsum.sched.budget import largest_chunk, with_prefill
from nitsum.sched.composed import Composed
from nitsum.sched.order import in_order
from nitsum.sched.targets import DELIVERY_S, MARGIN
from nitsum.sequence import Sequence
from nitsum.step import Chunk

if TYPE_CHECKING:
    from nitsum.sched.lane import LaneScheduler

MIN_CHUNK = 16
"""Chunks below this cost a step's overhead and bring nothing, unless they finish a prompt."""
PATIENCE = 4
"""Steps that may leave prefills out in a row; then they get a chunk whatever the slack says."""
PART_AHEAD = 0.25
"""Part of a step that goes to those served ahead of their turn while others need the rest."""
SHORT = 0.5
"""Part of its tokens that a step with decodes takes on while few prompts wait."""
FEW_STEPS = 8
"""In so many steps those prompts are through; more of them make steps longer again."""
OWN_STEP = 1.25
"""A step with a short prompt, in steps of the decodes alone."""


def add_prefills(lane: LaneScheduler, step: Composed, prefills: list[list[Sequence]]) -> None:
    """Chunks in order, each as large as the tightest affected decode allows.

    `prefills`: by level.
    """
    if lane.rules.slack:
        step.others_bear_s = min(_neighbours_bear_s(lane, step), _newcomers_bear_s(lane, step))
        step.all_bear_s = min(*step.tight_s, step.others_bear_s)
    left_at = [_left_tokens(sequences) for sequences in prefills]
    most = step.most_tokens = _most_tokens(lane, step)
    if lane.rules.slack and step.chunks and not lane.has_queued:
        step.most_tokens = min(most, _enough_tokens(lane, step, sum(left_at)))
    ahead, rest = in_order(lane, step, prefills)
    taken = [0] * len(lane.levels)
    is_whole = True
    if ahead:
        behind = sum(left_at) - _left_tokens(ahead)
        is_whole = _add_in_turn(lane, step, ahead, taken, behind)
    is_whole = _add_in_turn(lane, step, rest, taken, 0) and is_whole
    lane.num_dry = 0 if any(taken) else lane.num_dry + 1
    if step.chunks:
        step.predicted_s = lane.step_time(step)
    has_room = step.most_tokens < most and step.shape.num_tokens >= step.most_tokens
    if not is_whole and any(taken) and not has_room:
        lane.prefill_pace.note_step(taken, step.predicted_s)
    if not is_whole and lane.rules.slack:
        left_at = [left - tokens for left, tokens in zip(left_at, taken, strict=True)]
        _note_left(lane, step, prefills, left_at, sum(taken))
    if step.chunks:  # an empty step says nothing about the next
        lane.step_takes_tokens = lane.prefill_pace.tokens_per_s[0] * step.predicted_s


def _left_tokens(prefills: list[Sequence]) -> int:
    """Positions that are still to compute of all of them."""
    return sum([len(s.tokens) + s.num_sampling - s.num_dispatched for s in prefills])


def _note_left(
    lane: LaneScheduler,
    step: Composed,
    prefills: list[list[Sequence]],
    left_at: list[int],
    num_taken: int,
) -> None:
    """What the step, which took `num_taken` tokens, left to those after it: `left_at` by level."""
    served = {chunk.sequence for chunk in step.chunks[step.decodes.num_decode :]}
    is_pressed = [left > 2 * num_taken for left in accumulate(left_at)]
    for level, sequences in enumerate(prefills):
        without = [sequence for sequence in sequences if sequence not in served]
        lane.is_stalled[level] = bool(without)
        if is_pressed[level]:
            for sequence in [s for s in without if s.first_scheduled_s is None]:
                if _makes_way(sequence, step):
                    left_at[level] -= sequence.num_remaining
                    lane.put_back(sequence, step)
    lane.ahead_tokens = list(accumulate(left_at))


def _makes_way(sequence: Sequence, step: Composed) -> bool:
    """Of prompts of which nothing was computed, late ones give their slots back while others wait:
    in the queue, tenants take turns, and there is no KV to hold."""
    return (
        step.start_s > sequence.first_due_s
        and sequence.chain_start_s is None
        and not sequence.promoted
        and not sequence.num_restarts
    )


def _add_in_turn(
    lane: LaneScheduler,
    step: Composed,
    prefills: Iterable[Sequence],
    taken: list[int],
    behind: int,
) -> bool:
    """Chunks as long as there is room, counted in `taken` by level; whether all found room.

    While `behind` tokens wait for what is left, these take no more than a part of the step.
    """
    part: int | None = None
    for sequence in prefills:
        if len(step.chunks) >= lane.limits.max_num_seqs:
            return False
        num_tokens = fits = _chunk_tokens(lane, step, sequence, is_alone=not behind)
        if behind and fits:
            if part is None:
                part = max(MIN_CHUNK, int(PART_AHEAD * fits), fits - behind)
            num_tokens = min(fits, part)
            part -= num_tokens
        if not num_tokens:
            return False
        taken[lane.setting.level(sequence)] += num_tokens
        if num_tokens < sequence.num_remaining and not behind:
            _add_chunk(lane, step, sequence, num_tokens)
            return False
        _add_chunk(lane, step, sequence, num_tokens)
    return True


def _add_chunk(lane: LaneScheduler, step: Composed, sequence: Sequence, num_tokens: int) -> None:
    start = sequence.num_dispatched
    samples = num_tokens == sequence.num_remaining
    step.chunks.append(Chunk(sequence, start, num_tokens, samples))
    step.shape = with_prefill(step.shape, start, num_tokens, samples)
    step.tokens[lane.setting.level(sequence)] += num_tokens
    if samples:
        lane.waits.cancel(sequence)
    if samples and lane.rules.slack and sequence.pace_s is not None:
        _hold_to_first_token(lane, step, sequence, sequence.pace_s)


def _hold_to_first_token(
    lane: LaneScheduler, step: Composed, sequence: Sequence, pace_s: float
) -> None:
    """What else the step takes on must not make its first token late, unless it is anyway."""
    allowed_s = sequence.first_due_s - step.start_s - MARGIN * pace_s - DELIVERY_S
    if allowed_s < step.first_tight_s and lane.step_time(step) <= allowed_s:
        step.first_tight_s = allowed_s


def _chunk_tokens(
    lane: LaneScheduler, step: Composed, sequence: Sequence, *, is_alone: bool
) -> int:
    """Tokens of this prompt the step takes; 0 if it takes none. A guaranteed share is no bound if
    nobody else's prompt wants the rest: `is_alone`."""
    left = sequence.num_remaining
    most = min(left, step.most_tokens - step.shape.num_tokens)
    level = lane.setting.level(sequence)
    if lane.shares.protects(level) and not sequence.promoted and not is_alone:
        most = min(most, max(1, int(lane.shares.credits[level]) - step.tokens[level]))
    if lane.end_by_s < inf:
        most = _fitting(lane, step, sequence, most, lane.end_by_s - step.start_s)
    if not lane.rules.slack or most <= 0:
        return max(most, 0)
    count = _by_slack(lane, step, sequence, most)
    if count >= min(left, most, MIN_CHUNK):
        return count
    if step.shape.prefill_tokens or lane.num_dry < PATIENCE:
        return 0
    return min(most, _small_chunk(lane))


def _most_tokens(lane: LaneScheduler, step: Composed) -> int:
    """Positions the step may compute; with decodes in it, fewer, but some of prompts."""
    num_decode, most = step.decodes.num_decode, lane.limits.max_batch_tokens
    least = num_decode + _small_chunk(lane)
    if num_decode:
        mixed = lane.limits.max_mixed_tokens
        most = min(mixed, max(int(step.part * mixed), least))
    return min(most, least) if lane.takes_turns else most


def _enough_tokens(lane: LaneScheduler, step: Composed, num_left: int) -> int:
    """Positions of a step with decodes while all prompts have slots and `num_left` to go. Short
    steps cost little (decodes read the weights anyway) and make no stream wait long; they are too
    slow for many."""
    num_decode = step.decodes.num_decode
    short = int(SHORT * lane.limits.max_mixed_tokens)
    return max(short, num_decode + max(_small_chunk(lane), ceil(num_left / FEW_STEPS)))


def _small_chunk(lane: LaneScheduler) -> int:
    """What a step may take on of prompts when it should not, and they must go on."""
    return max(MIN_CHUNK, lane.limits.max_mixed_tokens // 8)


def _by_slack(lane: LaneScheduler, step: Composed, sequence: Sequence, most: int) -> int:
    """The chunk that all decodes bear; if it would come too late with that, the chunk that those
    of its own and higher tiers bear."""
    allowed_s = min(step.all_bear_s, step.first_tight_s)
    count = _fitting(lane, step, sequence, most, allowed_s)
    if count == most:
        return count
    level = lane.setting.level(sequence)
    higher_s = min(*step.tight_s[: level + 1], step.others_bear_s, step.first_tight_s)
    if higher_s <= allowed_s:
        return count
    num_steps = ceil(sequence.num_remaining / max(count, 1))
    on_time = step.start_s + num_steps * allowed_s <= sequence.first_due_s - DELIVERY_S
    is_lost = step.start_s > sequence.first_due_s
    return count if on_time or is_lost else _fitting(lane, step, sequence, most, higher_s)


def _fitting(
    lane: LaneScheduler, step: Composed, sequence: Sequence, most: int, allowed_s: float
) -> int:
    if allowed_s == inf:
        return most
    step_time, left, before = lane.shape_time, sequence.num_remaining, step.shape.prefill_tokens
    near = lane.slack_tokens - before
    start = sequence.num_dispatched
    count = largest_chunk(step_time, step.shape, start, left, most, allowed_s, near)
    if count < most:
        lane.slack_tokens = before + count
    return count


def _neighbours_bear_s(lane: LaneScheduler, step: Composed) -> float:
    """How long the step may hold its ranks before a lane that shares them must start."""
    starts = [other.next_start_s for other in lane.neighbours if other.has_work]
    return max(0.0, min(starts) - step.start_s) if starts else inf


def _newcomers_bear_s(lane: LaneScheduler, step: Composed) -> float:
    """How long the step may hold its ranks if a request with a short prompt comes right after it
    was sent, of a tier that had requests lately: its own step has to follow in time."""
    ttft_s = lane.newcomer_ttft_s(step.now)
    if ttft_s == inf:
        return inf
    own_s = OWN_STEP * lane.shape_time(step.decodes)
    return max(ttft_s - own_s, 2 * own_s)
