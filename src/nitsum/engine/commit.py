"""What a step's result changes: tokens become known, positions confirmed, answers complete."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from nitsum.engine.generation import Generation
from nitsum.engine.lanes import StepInFlight
from nitsum.engine.outputs import Outbox
from nitsum.events import Finished, StepEnded
from nitsum.kv.prefix import hash_block
from nitsum.messages import StepDone, TokenLogprobs
from nitsum.plan import Group
from nitsum.request import FinishReason
from nitsum.sequence import SeqState, Sequence

Drawn = tuple[int, TokenLogprobs | None, bytes | None]
"""A token as it came from a worker, with what was asked for beside it."""


class _Place(NamedTuple):
    """What tokens of one step share: where and when they came."""

    generation: Generation
    group: Group
    plan: str
    now: float


@dataclass
class Committer:
    """Applies results to sequences and says what clients should hear."""

    outbox: Outbox
    sequences: dict[str, Sequence]
    early: dict[str, dict[int, Drawn]] = field(
        default_factory=lambda: defaultdict[str, dict[int, Drawn]](dict)
    )
    """Tokens whose predecessor is still on its way from the lane the request just left."""
    hidden: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """What requests asked to hear with their first token, until it is told."""

    def commit(self, generation: Generation, step: StepInFlight, done: StepDone) -> None:
        """Every chunk of the step: confirm its positions, take its token."""
        if done.hidden:
            self._keep_hidden(step, done)
        place = self._place(generation, step.loop.group)
        counts: list[tuple[str, int]] = []
        drawn, size, lost = iter(_drawn(done)), generation.kv.arena.block_tokens, step.lost
        for sequence, start, num_tokens, samples in step.chunks:
            token = next(drawn) if samples else None
            if sequence.finish_reason is not None:
                continue
            end = start + num_tokens
            if end > sequence.num_computed and not (lost and sequence in lost):
                sequence.num_computed = end
            if token is not None:
                count = 1
                if end == len(sequence.tokens) and not self.early:
                    self._append(place, sequence, token)
                else:
                    count = self._take(place, sequence, end, token)
                counts.append((sequence.request_id, count))
            if num_tokens > 1 or not end % size:  # else no block became full
                self._register(generation, sequence)
        generation.emit(
            StepEnded(
                at_s=place.now,
                step_id=step.step_id,
                group=step.loop.group,
                seconds=done.seconds,
                tokens=counts,
                waited_s=done.waited_s,
            )
        )

    def finish(self, generation: Generation, sequence: Sequence, reason: FinishReason) -> None:
        """The end of a sequence, for whatever reason; frees what it holds."""
        group = sequence.group
        self.withdraw(generation, sequence, reason)
        generation.emit(
            Finished(
                at_s=generation.now(),
                request_id=sequence.request_id,
                tier=sequence.tier,
                reason=reason,
                num_output=sequence.num_output,
                num_cached=sequence.num_cached,
                group=group,
            )
        )

    def withdraw(
        self, generation: Generation, sequence: Sequence, reason: FinishReason = "error"
    ) -> None:
        """Free what a sequence holds and forget it; the caller says why."""
        sequence.finish_reason = reason
        generation.release(sequence)
        sequence.state = SeqState.FINISHED
        self.sequences.pop(sequence.request_id, None)
        self.early.pop(sequence.request_id, None)
        self.hidden.pop(sequence.request_id, None)

    def _place(self, generation: Generation, group: Group) -> _Place:
        return _Place(generation, group, generation.switcher.plan_of(group).name, generation.now())

    def _take(self, place: _Place, sequence: Sequence, end: int, drawn: Drawn) -> int:
        """Append the token after `end` positions, and those it let wait; how many were taken."""
        if end != len(sequence.tokens):
            self.early[sequence.request_id][end] = drawn
            return 0
        count = 1
        self._append(place, sequence, drawn)
        waiting = self.early.get(sequence.request_id)
        while waiting and len(sequence.tokens) in waiting and not sequence.is_finished:
            count += 1
            self._append(place, sequence, waiting.pop(len(sequence.tokens)))
        return count

    def _append(self, place: _Place, sequence: Sequence, drawn: Drawn) -> None:
        generation, group, plan, now = place
        token, logprobs, logits = drawn
        sequence.tokens.append(token)
        sequence.num_sampling -= 1
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        if sequence.group != group:  # moved on while the step ran
            plan = generation.switcher.plan_of(sequence.group).name
        reason = end_of(sequence)
        if reason is None and logprobs is None and logits is None and not self.hidden:
            self.outbox.put_token(sequence, token, plan)
            return
        if reason is not None:
            sequence.finish_reason = reason
            self._register(generation, sequence)
        hidden = self.hidden.pop(sequence.request_id, None)
        self.outbox.put_output(sequence, token, plan, logprobs, logits, hidden)
        if reason is not None:
            self.finish(generation, sequence, reason)

    def _keep_hidden(self, step: StepInFlight, done: StepDone) -> None:
        sampled = [chunk.sequence for chunk in step.chunks if chunk.samples]
        for sequence, hidden in zip(sampled, done.hidden, strict=True):
            if hidden is not None and not sequence.is_finished and not sequence.num_output:
                self.hidden[sequence.request_id] = hidden

    def _register(self, generation: Generation, sequence: Sequence) -> None:
        """Full blocks whose tokens are known and whose KV is confirmed may be shared."""
        kv = generation.kv
        if sequence.is_finished or sequence.request_id not in kv.tables:
            return
        size = kv.arena.block_tokens
        num_full = min(sequence.num_computed, len(sequence.tokens)) // size
        extend_hashes(sequence, num_full, size)
        if num_full > kv.tables[sequence.request_id].num_registered:
            level = generation.level(sequence)
            kv.register(sequence.request_id, sequence.hashes, num_full, level)


def extend_hashes(sequence: Sequence, num_blocks: int, block_tokens: int) -> None:
    """Make sure the hashes of the first `num_blocks` full blocks are known."""
    hashes = sequence.hashes
    while len(hashes) < num_blocks:
        start = len(hashes) * block_tokens
        previous = hashes[-1] if hashes else 0
        hashes.append(hash_block(previous, sequence.tokens[start : start + block_tokens]))


def end_of(sequence: Sequence) -> FinishReason | None:
    """Why the sequence ends with its last token, if it does."""
    tokens, stops = sequence.tokens, sequence.stops
    if stops and tokens[-1] in stops and _may_stop(sequence):
        return "stop"
    return "length" if len(tokens) >= sequence.num_most else None


def _may_stop(sequence: Sequence) -> bool:
    return sequence.num_output >= max(1, sequence.request.sampling.min_tokens)


def _drawn(done: StepDone) -> Iterable[Drawn]:
    if not done.logprobs and not done.logits:
        return zip(done.tokens, repeat(None), repeat(None), strict=False)
    logprobs = done.logprobs or [None] * len(done.tokens)
    logits = done.logits or [None] * len(done.tokens)
    return zip(done.tokens, logprobs, logits, strict=True)
