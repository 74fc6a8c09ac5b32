"""A fake machine that remembers, for every position of every unit, what was written there.

KV is a *tag*: a hash of all tokens up to a position, and the part of the heads. A step checks that
every tag it would attend to is the right one, writes its own, and draws a token that is a function
of the tags. So a stale block, a lost tail, a wrong head, a unit given to two owners or a token out
of order is an error at the step that would have read it, and an answer has one right value,
whatever the layout, the order of events and the switches in between.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import count

from nitsum.errors import WorkerDied
from nitsum.kv.cache import ArenaShape
from nitsum.kv.moves import page_units
from nitsum.messages import (
    FromWorker,
    Join,
    Move,
    MoveDone,
    Ready,
    Shutdown,
    Step,
    StepDone,
    ToWorker,
    Work,
)

Tag = tuple[int, int]
"""(hash of all tokens up to and with this position, unit of the heads)"""

VOCAB_SIZE = 50


def draw(prefix_hash: int) -> int:
    """The token that follows a prefix."""
    return random.Random(prefix_hash).randrange(VOCAB_SIZE)


def extend(prefix_hash: int, token: int) -> int:
    return hash((prefix_hash, token))


def answer_of(prompt: list[int], num_tokens: int, stops: Iterable[int] = ()) -> list[int]:
    """What any correct machine answers."""
    stops = set(stops)
    prefix_hash = 0
    for token in prompt:
        prefix_hash = extend(prefix_hash, token)
    answer: list[int] = []
    while len(answer) < num_tokens and not (answer and answer[-1] in stops):
        answer.append(draw(prefix_hash))
        prefix_hash = extend(prefix_hash, answer[-1])
    return answer


class _Slot:
    """A row of tokens, the hashes of its prefixes as far as they were taken, and its pages."""

    def __init__(self, join: Join, row: list[int]) -> None:
        self.num_known = join.num_known
        self.row = row
        self.pages: list[int] = []
        self._hashes: list[int] = []

    def prefix_hashes(self, end: int) -> list[int]:
        """Of the tokens up to and with each position, those before `end` at least."""
        hashes, row = self._hashes, self.row
        while len(hashes) < end:
            hashes.append(extend(hashes[-1] if hashes else 0, row[len(hashes)]))
        return hashes

    def put(self, position: int, token: int) -> None:
        """The row's new last token."""
        del self.row[position:], self._hashes[position:]
        self.row.append(token)


class FakeRank:
    """One rank: its FIFO, its memory, its slots."""

    def __init__(self) -> None:
        self.inbox: deque[ToWorker] = deque()
        self.num_done = 0
        self.memory: dict[int, dict[int, Tag]] = defaultdict(dict)
        self.host: dict[int, dict[int, Tag]] = defaultdict(dict)
        self.rows: dict[int, list[int]] = {}
        self.slots: dict[int, _Slot] = {}


class FakeExecutor:
    """Runs messages in a random order that the protocol allows."""

    def __init__(
        self,
        arena: ArenaShape,
        seed: int = 0,
        max_messages: int = 6,
        max_num_seqs: int | None = None,
    ) -> None:
        """`max_num_seqs`: what a step may contain at most, as on real workers."""
        self.arena = arena
        self.max_num_seqs = max_num_seqs
        self.random = random.Random(seed)
        self.max_messages = max_messages
        """Most messages run in one poll."""
        self.dying = False
        self.num_generations = 0
        self._start()

    def _start(self) -> None:
        self.ranks = [FakeRank() for _ in range(self.arena.num_ranks)]
        self._sent = [0] * self.arena.num_ranks
        self._replies: list[FromWorker] = []
        self._clock = count(1)

    # -- the protocol --

    def start(self) -> list[Ready]:
        self._start()
        self.num_generations += 1
        return [Ready(rank, self.arena.num_units, {}, {}) for rank in range(len(self.ranks))]

    def send(self, ranks: Iterable[int], message: ToWorker) -> None:
        for rank in ranks:
            self.ranks[rank].inbox.append(message)
            self._sent[rank] += 1

    def num_sent(self, rank: int) -> int:
        return self._sent[rank]

    def poll(self, timeout_s: float) -> list[FromWorker]:
        if self.dying:
            self.dying = False
            raise WorkerDied("Worker 0 was killed by the test.")
        for _ in range(self.random.randint(0, self.max_messages)):
            self._run_one()
        replies, self._replies = self._replies, []
        self.random.shuffle(replies)
        return replies

    def close(self) -> None:
        pass

    # -- running --

    def _run_one(self) -> None:
        heads = [rank for rank, state in enumerate(self.ranks) if state.inbox]
        self.random.shuffle(heads)
        for rank in heads:
            message = self.ranks[rank].inbox[0]
            if isinstance(message, Step) and self._is_aligned(message):
                self._run_step(message)
                return self._pop(message.group.ranks)
            if isinstance(message, Move) and self._is_due(message):
                self._run_move(rank, message)
                return self._pop([rank])
            if isinstance(message, Shutdown):
                return self._pop([rank])
        assert not heads, "deadlock: every rank waits for another"
        return None

    def _pop(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self.ranks[rank].inbox.popleft()
            self.ranks[rank].num_done += 1

    def _is_aligned(self, step: Step) -> bool:
        """All ranks of the lane have come to this step."""
        inboxes = [self.ranks[rank].inbox for rank in step.group.ranks]
        return all(inbox and inbox[0] is step for inbox in inboxes)

    def _is_due(self, move: Move) -> bool:
        return all(self.ranks[rank].num_done >= number for rank, number in move.after)

    def _run_step(self, step: Step) -> None:
        assert self.max_num_seqs is None or len(step.work) <= self.max_num_seqs, (
            "too many sequences"
        )
        for place, rank in enumerate(step.group.ranks):
            state = self.ranks[rank]
            for join in step.joins:
                row = list(join.tokens) if join.tokens else state.rows[join.slot]
                state.rows[join.slot] = row
                state.slots[join.slot] = _Slot(join, row)
            for update in step.pages:
                pages = state.slots[update.slot].pages
                pages[update.first :] = update.pages[place]
        tokens: list[int] = []
        for work in step.work:
            drawn = {self._run_work(step, rank, work) for rank in step.group.ranks}
            assert len(drawn) == 1, "ranks of a lane disagree"
            if work.samples:
                tokens.append(drawn.pop())
        self._replies.append(StepDone(step.step_id, step.group.leader, tokens, 0.0))

    def _run_work(self, step: Step, rank: int, work: Work) -> int:
        state = self.ranks[rank]
        slot = state.slots[work.slot]
        end = work.start + work.num_tokens
        assert end <= len(slot.row), "a step computes a position whose token nobody has"
        hashes = slot.prefix_hashes(end)
        units = page_units(step.group, rank, self.arena.units_per_block)
        for position in range(end):
            page, offset = divmod(position, self.arena.block_tokens)
            first = slot.pages[page] * len(units)
            for cell, unit in enumerate(units, first):
                tag = hashes[position], unit
                if position >= work.start:
                    state.memory[cell][offset] = tag
                found = state.memory[cell].get(offset)
                assert found == tag, (
                    f"step {step.step_id} {step.group}: rank {rank} page {slot.pages[page]} "
                    f"position {position} holds {found}, not {tag}"
                )
        if end < slot.num_known:
            return slot.row[end]
        token = draw(hashes[end - 1])
        if work.samples:
            slot.put(end, token)
        return token

    def _run_move(self, rank: int, move: Move) -> None:
        state = self.ranks[rank]
        pulled = [
            (dst, dict(self.ranks[pull.src_rank].memory[src]))
            for pull in move.pulls
            for src, dst in zip(pull.src_units, pull.dst_units, strict=True)
        ]
        pulled += [
            (dst, dict(self.ranks[load.src_rank].host[src]))
            for load in move.loads
            for src, dst in zip(load.src_units, load.dst_units, strict=True)
        ]
        saved = [
            (dst, dict(state.memory[src]))
            for save in move.saves
            for src, dst in zip(save.src_units, save.dst_units, strict=True)
        ]
        for dst, content in pulled:
            state.memory[dst] = content
        for dst, content in saved:
            state.host[dst] = content
        for row in move.rows:
            source = self.ranks[row.src_rank].rows[row.src_slot]
            assert row.num_tokens <= len(source), "a row is pulled before its last token is drawn"
            state.rows[row.dst_slot] = source[: row.num_tokens]
        self._replies.append(MoveDone(move.move_id, rank, 0.0, len(pulled) * self.arena.unit_bytes))
