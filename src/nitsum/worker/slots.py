"""What a rank knows of its sequences: a row of token ids and a page table for each slot.

A row is a sequence's whole state. Its tokens come from the engine (`Join`), from a peer (`Move`)
or from sampling; penalties and random streams are computed from it, so nothing else has to travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nitsum.messages import Join, Pages, Work
from nitsum.model.interface import Span, StepInput
from nitsum.request import SamplingParams
from nitsum.shared import Region


class SlotState(NamedTuple):
    """What a `Join` says of a slot, but for its tokens."""

    num_prompt: int
    num_known: int
    sampling: SamplingParams


class Draw(NamedTuple):
    """One token to draw: at position `len(row)`, after all tokens of `row`."""

    sampling: SamplingParams
    row: torch.Tensor  # [position] int32
    num_prompt: int
    known: int | None
    """The token is given (replay, teacher forcing)."""
    slot: int = -1
    """Where the row is; names the same sequence from step to step, until another takes it."""


def map_rows(region: Region, max_slots: int, row_tokens: int) -> torch.Tensor:
    """[max_slots, row_tokens] int32 over a rank's rows region."""
    count = max_slots * row_tokens
    flat = torch.frombuffer(region.map(), dtype=torch.int32, count=count)
    return flat.view(max_slots, row_tokens)


class Slots:
    """Rows (shared with peers), page tables and sampling parameters of one rank."""

    def __init__(self, rows: torch.Tensor, block_tokens: int) -> None:
        """`rows` is [max_slots, row_tokens] int32."""
        max_slots, row_tokens = rows.shape
        self._rows = rows
        self._block_tokens = block_tokens
        max_pages = -(-row_tokens // block_tokens)
        self._tables = torch.zeros(max_slots, max_pages, dtype=torch.int64)
        self._states: dict[int, SlotState] = {}

    def join(self, join: Join) -> None:
        if join.tokens:
            self._rows[join.slot, : len(join.tokens)] = torch.tensor(join.tokens, dtype=torch.int32)
        self._states[join.slot] = SlotState(join.num_prompt, join.num_known, join.sampling)

    def set_pages(self, pages: Pages, member: int) -> None:
        """Take this member's part of `pages`."""
        own = pages.pages[member]
        if own:
            self._tables[pages.slot, pages.first : pages.first + len(own)] = torch.tensor(own)

    def step_input(self, work: Sequence[Work]) -> StepInput:
        """Tokens, positions and pages of a step, from rows and tables as they are now."""
        slots = torch.tensor([part.slot for part in work])
        spans = _spans(work)
        seqs, positions = _expand(work)
        token_slots = slots[seqs]
        pages = self._tables[token_slots, positions // self._block_tokens]
        last_rows = [span.first + span.num_tokens - 1 for span in spans]
        return StepInput(
            tokens=self._rows[token_slots, positions].long(),
            positions=positions,
            kv_slots=pages * self._block_tokens + positions % self._block_tokens,
            page_table=self._page_table(slots, spans),
            spans=spans,
            sample_rows=torch.tensor(
                [row for row, part in zip(last_rows, work, strict=True) if part.samples],
                dtype=torch.int64,
            ),
        )

    def draws(self, work: Sequence[Work]) -> list[Draw]:
        """What is to be drawn after `work`, in its order."""
        return [self._draw(part) for part in work if part.samples]

    def record(self, work: Sequence[Work], tokens: Sequence[int]) -> None:
        """Write the drawn tokens behind the positions they were drawn from."""
        samples = [part for part in work if part.samples]
        if samples:
            slots = torch.tensor([part.slot for part in samples])
            positions = torch.tensor([_drawn_position(part) for part in samples])
            self._rows[slots, positions] = torch.tensor(tokens, dtype=torch.int32)

    def _draw(self, part: Work) -> Draw:
        num_prompt, num_known, sampling = self._states[part.slot]
        row = self._rows[part.slot]
        position = _drawn_position(part)
        known = int(row[position]) if position < num_known else None
        return Draw(sampling, row[:position], num_prompt, known, part.slot)

    def _page_table(self, slots: torch.Tensor, spans: tuple[Span, ...]) -> torch.Tensor:
        """[s, max_pages]; 0 behind a sequence's own pages, where a table holds older numbers."""
        counts = torch.tensor([-(-span.context // self._block_tokens) for span in spans])
        table = self._tables[slots, : int(counts.max())]
        return table.masked_fill_(torch.arange(table.shape[1]) >= counts[:, None], 0)


def _drawn_position(part: Work) -> int:
    return part.start + part.num_tokens


def _spans(work: Sequence[Work]) -> tuple[Span, ...]:
    spans: list[Span] = []
    first = 0
    for part in work:
        spans.append(Span(first, part.num_tokens, part.start + part.num_tokens))
        first += part.num_tokens
    return tuple(spans)


def _expand(work: Sequence[Work]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of the step: its sequence (0..s-1) and its position. [n] int64 each."""
    counts = torch.tensor([part.num_tokens for part in work])
    starts = torch.tensor([part.start for part in work])
    seqs = torch.repeat_interleave(torch.arange(len(work)), counts)
    firsts = torch.cumsum(counts, 0) - counts
    return seqs, torch.arange(len(seqs)) - firsts[seqs] + starts[seqs]
