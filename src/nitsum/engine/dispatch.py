"""From a decided step to messages: slots, joins, page differences, relocations."""

from __future__ import annotations

from itertools import count

from nitsum.engine.executor import Executor
from nitsum.kv.blocks import Relocation, Table
from nitsum.kv.cache import KvCache
from nitsum.kv.host import Load, Save
from nitsum.messages import Join, Move, Pages, Pull, RowPull, Step, Work
from nitsum.plan import Lane
from nitsum.sequence import Sequence
from nitsum.step import Chunk


class Dispatcher:
    """Keeps what the workers know about slots, and sends them only what changed."""

    def __init__(self, executor: Executor, kv: KvCache, max_slots: int) -> None:
        self.executor = executor
        self.kv = kv
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._unjoined: set[int] = set()
        """Slots whose row a `Move` brought; their first step says how to sample."""
        self._settled: dict[int, int] = {}
        """Messages after which a rank has made all copies inside itself."""
        self._saved: dict[int, int] = {}
        """Messages after which a rank has saved all it was to save."""
        self._loads: dict[int, int] = {}
        """Loads that read other ranks' host memory, by move."""
        self._move_ids = count(1)

    # -- slots --

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> int | None:
        return self._free_slots.pop() if self._free_slots else None

    def free_slot(self, slot: int) -> None:
        self._unjoined.discard(slot)
        self._free_slots.append(slot)

    def expect_join(self, slot: int) -> None:
        """The slot's row arrives by a `Move`."""
        self._unjoined.add(slot)

    # -- steps --

    def send_step(self, lane: Lane, step_id: int, epoch: int, chunks: tuple[Chunk, ...]) -> None:
        self.flush_copies()
        joins: list[Join] = []
        pages: list[Pages] = []
        work: list[Work] = []
        tables, unjoined = self.kv.tables, self._unjoined
        for sequence, start, num_tokens, samples in chunks:
            slot = sequence.slot
            if slot is None or slot in unjoined:
                joins.append(self._join(sequence))
                slot = joins[-1].slot
            table = tables[sequence.request_id]
            if table.num_sent != len(table.blocks):
                pages.append(self._pages(table, slot))
            work.append(Work(slot, start, num_tokens, samples))
        self.executor.send(lane.ranks, Step(step_id, epoch, lane.group, joins, pages, work))

    def _join(self, sequence: Sequence) -> Join:
        if sequence.slot is None:
            sequence.slot = self.take_slot()
            assert sequence.slot is not None, "admitted without a free slot"
            forced = sequence.request.sampling.forced_tokens
            tokens = sequence.tokens + list(forced[sequence.num_output :])
            return self._describe(sequence, sequence.slot, tokens)
        self._unjoined.discard(sequence.slot)
        return self._describe(sequence, sequence.slot, [])

    def _describe(self, sequence: Sequence, slot: int, tokens: list[int]) -> Join:
        sampling = sequence.request.sampling
        return Join(slot, tokens, sequence.num_prompt, sequence.num_known, sampling)

    def _pages(self, table: Table, slot: int) -> Pages:
        first, table.num_sent = table.num_sent, len(table.blocks)
        return Pages(slot, first, self.kv.slot_pages(table, first))

    # -- moves --

    def send_move(
        self,
        rank: int,
        pulls: list[Pull],
        rows: list[RowPull],
        after: list[tuple[int, int]],
    ) -> int:
        self.flush_copies()
        move_id = next(self._move_ids)
        self.executor.send([rank], Move(move_id, pulls, rows, after))
        return move_id

    def num_sent(self, rank: int) -> int:
        self.flush_copies()
        return self.executor.num_sent(rank)

    def num_settled(self, rank: int) -> int:
        self.flush_copies()
        return self._settled.get(rank, 0)

    def flush_copies(self) -> None:
        """Send the copies that made room, in order, before anything relies on them.

        Relocations travel together as far as they may. Copies that build on each other (a freed
        place is taken again) go in separate messages: within one, everything is read before
        anything is written.
        """
        pending: dict[int, Pull] = {}
        for copy in self.kv.take_copies():
            if isinstance(copy, Relocation):
                self._gather(pending, copy)
                continue
            before = pending.pop(copy.rank, None)
            if before is not None:
                self._relocate(before)
            if isinstance(copy, Save):
                self._save(copy)
            else:
                self._load(copy)
        for pull in pending.values():
            self._relocate(pull)

    def acknowledge(self, move_id: int) -> None:
        """A rank has carried a move out."""
        load_id = self._loads.pop(move_id, None)
        if load_id is not None:
            self.kv.host.done(load_id)

    def _gather(self, pending: dict[int, Pull], copy: Relocation) -> None:
        src = range(copy.src_unit, copy.src_unit + copy.count)
        dst = range(copy.dst_unit, copy.dst_unit + copy.count)
        pull = pending.setdefault(copy.rank, Pull(copy.rank, [], []))
        touched = set(pull.src_units) | set(pull.dst_units)
        if touched.intersection(src) or touched.intersection(dst):
            self._relocate(pull)
            pull = pending[copy.rank] = Pull(copy.rank, [], [])
        pull.src_units.extend(src)
        pull.dst_units.extend(dst)

    def _save(self, save: Save) -> None:
        pull = Pull(save.rank, save.units, save.host_units)
        self.executor.send([save.rank], Move(next(self._move_ids), [], saves=[pull]))
        self._saved[save.rank] = self.executor.num_sent(save.rank)

    def _load(self, load: Load) -> None:
        """Peers' host memory is read once they have saved into it."""
        rank, move_id = load.rank, next(self._move_ids)
        pulls = [Pull(src, host, arena) for src, (host, arena) in load.sources.items()]
        after = [(src, self._saved[src]) for src in sorted(load.sources) if src != rank]
        self.executor.send([rank], Move(move_id, [], after=after, loads=pulls))
        self._settled[rank] = self.executor.num_sent(rank)
        if load.load_id is not None:
            self._loads[move_id] = load.load_id

    def _relocate(self, pull: Pull) -> None:
        rank = pull.src_rank
        self.executor.send([rank], Move(next(self._move_ids), [pull]))
        self._settled[rank] = self.executor.num_sent(rank)
