"""An engine by hand: a tiny model on two ranks, steps and moves written out as messages."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from nitsum.config import EngineConfig
from nitsum.engine.process_executor import ProcessExecutor
from nitsum.kv.moves import moves
from nitsum.messages import (
    Join,
    Move,
    MoveDone,
    Pages,
    Pull,
    RowPull,
    Step,
    StepDone,
    StepsTimed,
    Work,
)
from nitsum.plan import Group, default_plans
from nitsum.request import SamplingParams
from nitsum.shape import Geometry, ModelShape

PROMPT = [5, 77, 130, 8, 199, 42, 42, 17, 3, 160, 91]
NUM_BLOCKS = 8
BLOCK_TOKENS = 4

ALONE_0, ALONE_1, BOTH = Group(1, 0), Group(1, 1), Group(2, 0)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 100,
    "vocab_size": 203,
    "max_position_embeddings": 256,
}


def make_config(folder: Path, **changes: Any) -> EngineConfig:
    """Two ranks, random weights; the checkpoint is a config.json in `folder`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    fields: dict[str, Any] = {
        "model": str(folder),
        "plans": default_plans(2),
        "load_format": "dummy",
        "block_tokens": BLOCK_TOKENS,
        "kv_bytes": 1 << 20,
        "max_num_seqs": 4,
        "max_batch_tokens": 64,
        "num_threads": 1,
        "timeout_s": 20.0,
    }
    return EngineConfig(**(fields | changes))


def make_executor(config: EngineConfig) -> ProcessExecutor:
    return ProcessExecutor(config, ModelShape.from_folder(Path(config.model)))


class Driver:
    """Steps one sequence at a time; every new place of it gets a slot and pages of its own."""

    def __init__(self, config: EngineConfig) -> None:
        self.executor = make_executor(config)
        shape = ModelShape.from_folder(Path(config.model))
        self.num_units = Geometry(shape, config.max_tp).num_units
        self._next_id = 0
        self._next_slot = 0
        self._next_unit = 0

    def place(self) -> tuple[int, int]:
        """A slot nobody used yet, and the first of the units for `NUM_BLOCKS` pages of any size.

        Both start again from 0 when they run out: the tests before have finished.
        """
        self._next_slot = (self._next_slot + 1) % 32
        self._next_unit = (self._next_unit + NUM_BLOCKS * self.num_units) % 256
        return self._next_slot, self._next_unit

    def pages(self, group: Group, first_unit: int) -> list[list[int]]:
        """Pages on each rank of the lane; on odd ranks in opposite order, as they may be."""
        per_page = self.units_per_page(group)
        first = first_unit // per_page
        ascending = list(range(first, first + NUM_BLOCKS))
        return [ascending if rank % 2 == 0 else ascending[::-1] for rank in group.ranks]

    def units_per_page(self, group: Group) -> int:
        return max(1, self.num_units // group.degree)

    def step(
        self,
        group: Group,
        work: Work,
        joins: list[Join] | None = None,
        pages: list[Pages] | None = None,
    ) -> None:
        self.send(group, [work], joins, pages)

    def send(
        self,
        group: Group,
        work: list[Work],
        joins: list[Join] | None = None,
        pages: list[Pages] | None = None,
    ) -> None:
        """A step of several sequences."""
        self._next_id += 1
        self.executor.send(
            group.ranks, Step(self._next_id, 1, group, joins or [], pages or [], work)
        )

    def prefill(self, group: Group, slot: int, unit: int, sampling: SamplingParams) -> None:
        """In two chunks, the second one sampling."""
        num_prompt = len(PROMPT)
        join = Join(slot, PROMPT, num_prompt, num_prompt, sampling)
        self.step(group, Work(slot, 0, 7, False), [join], [Pages(slot, 0, self.pages(group, unit))])
        self.step(group, Work(slot, 7, num_prompt - 7, True))

    def decode(self, group: Group, slot: int, start: int, num_steps: int) -> None:
        for position in range(start, start + num_steps):
            self.step(group, Work(slot, position, 1, True))

    def switch(
        self,
        src: Group,
        dst: Group,
        num_tokens: int,
        src_place: tuple[int, int],
        sampling: SamplingParams,
    ) -> tuple[int, int]:
        """Move the sequence behind its last step of `src`; its row, and all of its blocks.

        `num_tokens` counts the positions whose token is drawn, or being drawn.
        """
        place = self.place()
        after = [(rank, self.executor.num_sent(rank)) for rank in src.ranks]
        for rank in dst.ranks:
            pulls = self.pulls(src, dst, rank, src_place[1], place[1])
            row = RowPull(src.leader, src_place[0], place[0], num_tokens)
            self._next_id += 1
            self.executor.send([rank], Move(self._next_id, pulls, [row], after))
        self.step(
            dst,
            Work(place[0], num_tokens - 1, 1, True),
            [Join(place[0], [], len(PROMPT), len(PROMPT), sampling)],
            [Pages(place[0], 0, self.pages(dst, place[1]))],
        )
        return place

    def save(self, group: Group, unit: int) -> dict[int, dict[int, int]]:
        """Copy all blocks of a place to host memory; by rank, where each unit went."""
        saved: dict[int, dict[int, int]] = {}
        for rank, pages in zip(group.ranks, self.pages(group, unit), strict=True):
            per_page = self.units_per_page(group)
            units = [page * per_page + i for page in pages for i in range(per_page)]
            saved[rank] = {unit: place for place, unit in enumerate(units)}
            self._next_id += 1
            save = Pull(rank, units, list(saved[rank].values()))
            self.executor.send([rank], Move(self._next_id, [], saves=[save]))
        return saved

    def load(
        self,
        src: Group,
        dst: Group,
        num_tokens: int,
        src_place: tuple[int, int],
        saved: dict[int, dict[int, int]],
        sampling: SamplingParams,
    ) -> int:
        """Bring the sequence back, in a slot and in units of its own; like `switch`, a step of
        `dst` follows. Returns the slot."""
        slot, unit = self.place()
        after = [(rank, self.executor.num_sent(rank)) for rank in src.ranks]
        for rank in dst.ranks:
            loads = [
                Pull(
                    pull.src_rank, [saved[pull.src_rank][u] for u in pull.src_units], pull.dst_units
                )
                for pull in self.pulls(src, dst, rank, src_place[1], unit)
            ]
            row = RowPull(src.leader, src_place[0], slot, num_tokens)
            self._next_id += 2
            self.executor.send([rank], Move(self._next_id - 1, [], after=after, loads=loads))
            self.executor.send([rank], Move(self._next_id, [], [row], after))
        self.step(
            dst,
            Work(slot, num_tokens - 1, 1, True),
            [Join(slot, [], len(PROMPT), len(PROMPT), sampling)],
            [Pages(slot, 0, self.pages(dst, unit))],
        )
        return slot

    def pulls(self, src: Group, dst: Group, rank: int, src_unit: int, dst_unit: int) -> list[Pull]:
        """All units that `rank` needs, by the rank that has them."""
        by_peer: dict[int, Pull] = {}
        src_pages, dst_pages = self.pages(src, src_unit), self.pages(dst, dst_unit)
        for move in moves(src, dst, self.num_units):
            if move.dst_rank != rank:
                continue
            pull = by_peer.setdefault(move.src_rank, Pull(move.src_rank, [], []))
            for block in range(NUM_BLOCKS):
                src_page = src_pages[move.src_rank - src.leader][block]
                dst_page = dst_pages[rank - dst.leader][block]
                pull.src_units.append(src_page * self.units_per_page(src) + move.src_unit)
                pull.dst_units.append(dst_page * self.units_per_page(dst) + move.dst_unit)
        return list(by_peer.values())

    def collect(self, num_steps: int) -> list[StepDone]:
        """Replies of `num_steps` steps, in order; those of moves are passed over."""
        done: list[StepDone] = []
        deadline_s = time.monotonic() + 60
        while len(done) < num_steps and time.monotonic() < deadline_s:
            for reply in self.executor.poll(1.0):
                assert isinstance(reply, StepDone | StepsTimed | MoveDone), reply
                if isinstance(reply, StepDone):
                    done.append(reply)
        return sorted(done, key=lambda reply: reply.step_id)

    def generate(self, group: Group, num_tokens: int, sampling: SamplingParams) -> list[StepDone]:
        """Prefill and decode in one lane; replies of the steps that drew a token."""
        slot, unit = self.place()
        self.prefill(group, slot, unit, sampling)
        self.decode(group, slot, len(PROMPT), num_tokens - 1)
        return self.collect(num_tokens + 1)[1:]

    def generate_across(
        self, src: Group, dst: Group, num_before: int, num_tokens: int, sampling: SamplingParams
    ) -> list[StepDone]:
        """The same with a switch after `num_before` tokens; nobody waits for a reply on the way."""
        place = self.place()
        self.prefill(src, *place, sampling)
        self.decode(src, place[0], len(PROMPT), num_before - 1)
        position = len(PROMPT) + num_before
        slot, _ = self.switch(src, dst, position, place, sampling)
        self.decode(dst, slot, position, num_tokens - num_before - 1)
        return self.collect(num_tokens + 1)[1:]


def tokens_of(done: list[StepDone]) -> list[int]:
    return [token for reply in done for token in reply.tokens]


def logits_of(done: list[StepDone]) -> list[tuple[float, ...]]:
    """Of each drawn token; the requests asked for them."""
    raw = [logits for reply in done for logits in reply.logits]
    return [struct.unpack(f"{len(one) // 4}f", one) for one in raw if one is not None]


def largest_difference(a: list[StepDone], b: list[StepDone]) -> float:
    pairs = zip(logits_of(a), logits_of(b), strict=True)
    return max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))
