"""Room in the KV arena: who has to make way for whom, and where its KV goes.

Paused sequences go before running ones, the lowest tier first, the latest arrival of a tier first.
KV goes to host memory while there is room in it, and is dropped otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nitsum.kv.cache import KvCache
from nitsum.sched.composed import Composed, Preemption
from nitsum.sequence import SeqState, Sequence

if TYPE_CHECKING:
    from nitsum.sched.lane import LaneScheduler


def admit(lane: LaneScheduler, sequence: Sequence, rank: int, step: Composed) -> bool:
    """Blocks for all its tokens. Running sequences of its own level are left alone."""
    num_tokens = len(sequence.tokens)
    if sequence.num_restarts and not _has_headroom(lane, num_tokens):
        return False
    while not lane.kv.grow(sequence.request_id, num_tokens):
        if not _make_way(lane, sequence, rank, step):
            return False
    return True


def restore(lane: LaneScheduler, sequence: Sequence, rank: int, step: Composed) -> bool:
    """Its KV back from host memory, into this lane's layout."""
    if not _has_headroom(lane, sequence.num_total + 1):
        return False
    group = lane.lane.group
    level = lane.setting.tiers[sequence.tier].level
    while not lane.kv.restore(sequence.request_id, group, level):
        if not _make_way(lane, sequence, rank, step):
            return False
    return True


def grow(lane: LaneScheduler, sequence: Sequence, num_tokens: int, step: Composed) -> bool:
    """Blocks for a running sequence to go on; later ones of its level make way, too."""
    while not lane.kv.grow(sequence.request_id, num_tokens):
        level = lane.setting.level(sequence)
        if not _make_way(lane, sequence, level, step, growing=True):
            return False
    return True


def yield_kv(lane: LaneScheduler, victim: Sequence, by: Sequence, step: Composed) -> None:
    """The victim's device memory is free after this, and it is not part of the step."""
    owner = _lane_of(lane, victim)
    step.take_out(victim)
    kept = owner.rules.keeps_kv and owner.kv.offload(victim.request_id)
    if kept and victim.state is SeqState.RUNNING:
        owner.pause(victim, by, step)
    elif not kept:
        owner.leave(victim)
        victim.wait_from_s = max(victim.wait_from_s, step.now)
        owner.kv.close(victim.request_id)
    step.preempted.append(Preemption(victim, by, kept))


def is_moving(kv: KvCache, sequence: Sequence) -> bool:
    """Peers may be reading its KV: giving it up would free nothing now."""
    return any(block.pins for block in kv.tables[sequence.request_id].blocks)


def _make_way(
    lane: LaneScheduler, asking: Sequence, rank: int, step: Composed, *, growing: bool = False
) -> bool:
    """The next victim's room is free; False if there is none."""
    victim = _victim(lane, asking, rank, growing)
    if victim is None:
        return False
    yield_kv(lane, victim, asking, step)
    return True


def _has_headroom(lane: LaneScheduler, num_tokens: int) -> bool:
    """Whether work that comes back would not have to leave at once: every running sequence
    may need a block soon. With nothing running there is nothing to wait for."""
    if not lane.num_running:
        return True
    needed = -(-num_tokens // lane.kv.arena.block_tokens) + lane.num_running
    return lane.kv.free_blocks(lane.lane.group) >= needed


def _victim(lane: LaneScheduler, asking: Sequence, rank: int, growing: bool) -> Sequence | None:
    lanes = (lane, *lane.neighbours) if lane.rules.displaces else (lane,)
    for other in lanes:
        found = _last(lane.kv, _held_paused(other), asking, rank, same_level=other is lane)
        if found is not None:
            return found
    if not (growing or lane.rules.displaces):
        return None
    for other in lanes:
        same_level = growing and other is lane
        found = _last(lane.kv, _running(other), asking, rank, same_level=same_level)
        if found is not None:
            return found
    return None


def _last(
    kv: KvCache,
    levels: Iterable[tuple[int, Iterable[Sequence]]],
    asking: Sequence,
    rank: int,
    *,
    same_level: bool,
) -> Sequence | None:
    """The latest of the lowest level that ranks behind the one that asks and is not moving."""
    for level, sequences in levels:
        if level < rank or (level == rank and not same_level):
            return None
        behind = [
            sequence
            for sequence in sequences
            if sequence is not asking
            and not sequence.promoted
            and (level > rank or _place(sequence) > _place(asking))
            and not is_moving(kv, sequence)
        ]
        if behind:
            return max(behind, key=_place)
    return None


def _lane_of(lane: LaneScheduler, sequence: Sequence) -> LaneScheduler:
    for other in (lane, *lane.neighbours):
        if other.lane.group == sequence.group:
            return other
    raise AssertionError(f"{sequence.request_id} is on another lane")


def _place(sequence: Sequence) -> tuple[int, float, str]:
    request = sequence.request
    return (request.order, request.arrival_s, request.request_id)


def _held_paused(lane: LaneScheduler) -> Iterator[tuple[int, list[Sequence]]]:
    tables = lane.kv.tables
    for level in reversed(lane.levels):
        yield level, [s for s in lane.paused[level] if s.request_id in tables]


def _running(lane: LaneScheduler) -> Iterator[tuple[int, Iterable[Sequence]]]:
    for level in reversed(lane.levels):
        yield level, lane.running[level]
