"""Slots of a lane: who gets one next, who gives one up for it, and the KV that goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nitsum.sched import room
from nitsum.sched.composed import Composed, Resumption
from nitsum.sequence import SeqState, Sequence

if TYPE_CHECKING:
    from nitsum.sched.lane import LaneScheduler

MOST_BLOCKS = 96
"""Blocks a step may give to prompts in any case: a few milliseconds where others must make way."""
PROMOTED = -1
"""Rank of a request that waited as long as its tier allows: before every level."""


class Candidate(NamedTuple):
    """Who should get a slot next, and ahead of whom."""

    sequence: Sequence
    rank: int
    """It may displace levels above this number."""


def fill_slots(lane: LaneScheduler, step: Composed) -> None:
    """Slots for those next in order, displacing strictly lower tiers where all are taken."""
    while (candidate := _next_candidate(lane, step)) is not None:
        if not _place(lane, candidate, step):
            return


def _waited_long(lane: LaneScheduler, step: Composed) -> Sequence | None:
    """Who has waited as long as its tier allows and has no slot. Prompts that have one and do
    not get through waited, too: they are promoted where they are."""
    while lane.num_promoted < max(1, lane.limits.max_num_seqs // 2):
        waited = lane.waits.due(step.now)
        if waited is None or waited.state is not SeqState.RUNNING:
            return waited
        lane.waits.cancel(waited)
        lane.note_waited(waited, step.now)
        lane.num_promoted += 1
        waited.promoted = True
        step.promoted.append(waited)
    return None


def _next_candidate(lane: LaneScheduler, step: Composed) -> Candidate | None:
    now = step.now
    if lane.rules.shares:
        waited = _waited_long(lane, step)
        if waited is not None:
            return Candidate(waited, PROMOTED)
        if lane.num_running < lane.limits.max_num_seqs:
            owed = lane.shares.owed(lane.has_backlog)
            if owed is not None and (head := _owed_head(lane, owed, now)) is not None:
                return Candidate(head, owed)
    for level in lane.queued_levels():
        if (head := next_of(lane, level, now)) is not None:
            return Candidate(head, level)
    return None


def _owed_head(lane: LaneScheduler, level: int, now: float) -> Sequence | None:
    return lane.returning[level].head() or lane.waiting[level].head(now)


def next_of(lane: LaneScheduler, level: int, now: float) -> Sequence | None:
    """The first of a level without a slot; those that are late anyway only if the next step will
    come to them."""
    has_turn = lane.ahead_tokens[level] < lane.step_takes_tokens
    return lane.returning[level].head() or lane.waiting[level].head(now, late=has_turn)


def _place(lane: LaneScheduler, candidate: Candidate, step: Composed) -> bool:
    """A slot and KV for the candidate; False, and it waits, if either cannot be had."""
    sequence, rank = candidate
    if _is_full(lane) and _slot_victim(lane, rank) is None:
        return False
    if not _give_kv(lane, sequence, rank, step):
        return False
    if _is_full(lane):
        victim = _slot_victim(lane, rank)
        if victim is not None:
            lane.pause(victim, sequence, step)
    if rank == PROMOTED:
        sequence.promoted = True
        step.promoted.append(sequence)
    lane.start(sequence, step.now)
    return True


def _is_full(lane: LaneScheduler) -> bool:
    return lane.num_running >= lane.limits.max_num_seqs


def _slot_victim(lane: LaneScheduler, rank: int) -> Sequence | None:
    """Who gives up its slot: the latest of the lowest level, if that is below `rank`."""
    if not lane.rules.displaces:
        return None
    for level in reversed(lane.levels):
        if level <= rank:
            return None
        if lane.shares.protects(level):
            continue
        for sequence in reversed(lane.running[level]):
            if not sequence.promoted:
                return sequence
    return None


# --- KV ------------------------------------------------------------------------------------------


def _give_kv(lane: LaneScheduler, sequence: Sequence, rank: int, step: Composed) -> bool:
    request_id = sequence.request_id
    if request_id in lane.kv.tables:
        step.resumed.append(Resumption(sequence, 0))
        return True
    if lane.is_closing or lane.is_new:
        return False
    if request_id in lane.kv.parked:
        return _restore(lane, sequence, rank, step)
    return _admit(lane, sequence, rank, step)


def _restore(lane: LaneScheduler, sequence: Sequence, rank: int, step: Composed) -> bool:
    """Bring KV back from host memory, with room to go on for a while."""
    if step.has_lost(sequence):
        return False
    rejoins = lane.kv.parked[sequence.request_id].group != lane.lane.group
    if rejoins and sequence.num_sampling:
        return False  # its last token is still on its way from the other lane
    if sequence.slot is None and not step.num_free_slots:
        return False
    if not room.restore(lane, sequence, rank, step):
        return False
    step.num_free_slots -= sequence.slot is None
    step.resumed.append(Resumption(sequence, 0, rejoins))
    return True


def _admit(lane: LaneScheduler, sequence: Sequence, rank: int, step: Composed) -> bool:
    """KV for a whole prompt; False while there is no room."""
    if not step.num_free_slots or step.num_new_blocks >= _most_blocks(lane):
        return False
    if sequence.num_sampling:
        return False  # a token drawn before it gave up its KV is still on its way
    num_tokens = len(sequence.tokens)
    if lane.is_settling and not lane.kv.has_free(lane.lane.group, num_tokens):
        return False
    limit = (num_tokens - 1) // lane.kv.arena.block_tokens
    num_cached = lane.kv.open(
        sequence.request_id,
        lane.lane.group,
        sequence.hashes[:limit],
        lane.setting.tiers[sequence.tier].level,
    )
    if not room.admit(lane, sequence, rank, step):
        lane.kv.close(sequence.request_id)
        return False
    step.num_free_slots -= 1
    num_blocks = len(lane.kv.tables[sequence.request_id].blocks)
    step.num_new_blocks += num_blocks - num_cached // lane.kv.arena.block_tokens
    if not sequence.num_restarts:  # later hits are on its own earlier work
        sequence.num_cached = num_cached
    sequence.num_dispatched = sequence.num_computed = num_cached
    _note_admitted(lane, sequence, num_tokens - num_cached, step)
    return True


def _most_blocks(lane: LaneScheduler) -> int:
    """KV that a step may give to prompts, twice what it can fill: finding room takes time, and who
    comes next gets it in the next step."""
    return max(MOST_BLOCKS, 2 * lane.limits.max_batch_tokens // lane.kv.arena.block_tokens)


def _note_admitted(lane: LaneScheduler, sequence: Sequence, num_new: int, step: Composed) -> None:
    if sequence.num_restarts:
        step.resumed.append(Resumption(sequence, num_new))
    else:
        lane.charge_prompt(sequence, num_new)
