"""Drawing on the device: the leader draws, every member records what it drew.

What a slot asks for is uploaded once, when it joins; the host keeps only which stages that takes,
and who wants to hear log-probabilities or logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from nitsum.kernels.draw import DrawBuffers, draw, draw_buffers, logprobs
from nitsum.kernels.prepare import record
from nitsum.kernels.sampling_table import (
    SamplingNeeds,
    empty_table,
    sampling_lines,
    sampling_needs,
)
from nitsum.kernels.shape_logits import shape_logits
from nitsum.messages import Join, TokenLogprobs, Work
from nitsum.request import SamplingParams
from nitsum.worker.cuda.comm import CudaComm
from nitsum.worker.cuda.state import to_host, upload

GREEDY = SamplingNeeds()
RANDOM = SamplingNeeds(random=True)
FILTERED = SamplingNeeds(random=True, top_k=True, top_p=True)
CAPTURED = (GREEDY, RANDOM, FILTERED)
"""Graphs exist for these; a batch takes the first that does all it needs."""


def captured_needs(needs: SamplingNeeds) -> SamplingNeeds | None:
    """Which of `CAPTURED` draws for `needs`; None when logits are to be shaped first.

    Grammars mask logits before any draw, and reports come after it: neither asks anything of it.
    """
    if needs.shapes_logits:
        return None
    if needs.keeps_grammar or needs.reports:
        needs = needs._replace(keeps_grammar=False, reports=False)
    return next(known for known in CAPTURED if known.union(needs) == known)


class Asked(NamedTuple):
    """What the host remembers of a slot."""

    needs: SamplingNeeds
    sampling: SamplingParams


class Draws(NamedTuple):
    """The rows of a step that draw, [m] each on the device; -1 and 0 are padding."""

    slots: torch.Tensor
    positions: torch.Tensor

    def first(self, num_draws: int) -> Draws:
        return Draws(self.slots[:num_draws], self.positions[:num_draws])


class Reports(NamedTuple):
    """What requests asked to hear of one step, on its way to the host."""

    rows: list[int]
    """Draws whose log-probabilities are reported."""
    num_top: list[int]
    logprobs: tuple[torch.Tensor, ...]
    """(of the drawn token [r], top ids [r, k], theirs [r, k]), pinned."""
    logit_rows: list[int]
    logits: torch.Tensor | None
    """[l, V] float32, pinned."""
    hidden_rows: list[int]
    hidden: torch.Tensor | None
    """[h, hidden] float32, pinned: the states that tokens were drawn from."""


class DeviceSampler:
    """The sampling table of a rank's slots, and scratch for the largest step."""

    def __init__(self, rows: torch.Tensor, max_draws: int, vocab_size: int) -> None:
        """`rows` [slots, row_tokens] int32 is where drawn tokens go."""
        num_slots, device = rows.shape[0], rows.device
        self._rows = rows
        self._table = empty_table(num_slots, device)
        self._num_known = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._buffers: DrawBuffers = draw_buffers(max_draws, vocab_size, device)
        self._counts = torch.zeros(max_draws, vocab_size, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(max_draws, dtype=torch.int32, device=device)
        """What the last step drew."""
        self._asked: dict[int, Asked] = {}

    def join(self, joins: Sequence[Join]) -> None:
        """On the current stream: these slots sample like this from now on. One upload, as a switch
        brings a whole batch along."""
        if not joins:
            return
        slots = [join.slot for join in joins]
        heads = np.array([slots, [join.num_known for join in joins]], dtype=np.int32)
        numbers = np.concatenate([heads.reshape(-1), sampling_lines(joins).reshape(-1)])
        uploaded = upload(torch.from_numpy(numbers), self._table.device)
        places, known = uploaded[: len(joins)].long(), uploaded[len(joins) : 2 * len(joins)]
        self._table.index_copy_(0, places, uploaded[2 * len(joins) :].view(len(joins), -1))
        self._num_known.index_copy_(0, places, known)
        for join in joins:
            self._asked[join.slot] = Asked(sampling_needs(join.sampling), join.sampling)

    def needs(self, work: Sequence[Work]) -> SamplingNeeds:
        """Of all draws together."""
        needs = GREEDY
        for part in work:
            if part.samples:
                asked = self._asked[part.slot].needs
                if asked != needs:
                    needs = needs.union(asked)
        return needs

    def draw(
        self,
        logits: torch.Tensor,
        draws: Draws,
        needs: SamplingNeeds,
        comm: CudaComm,
        max_position: int = 0,
    ) -> None:
        """From float32 logits [m, V], which shaping changes, into `tokens` and the rows.

        Nothing is read by the host, so that it can be captured (unless logits are shaped, whose
        grid follows `max_position`).
        """
        tokens = self.tokens[: logits.shape[0]]
        if comm.is_leader:
            if needs.shapes_logits:
                self._shape(logits, draws, max_position)
            draw(logits, self._table, *draws, needs, self._buffers, tokens)
        comm.broadcast(tokens)
        record(self._rows, self._num_known, *draws, tokens)

    def _shape(self, logits: torch.Tensor, draws: Draws, max_position: int) -> None:
        shape_logits(logits, self._rows, self._table, *draws, self._counts, max_position)

    # -- what is reported --

    def reports(
        self, work: Sequence[Work], logits: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor
    ) -> Reports:
        """From raw `logits` and the tokens just drawn, on their way to pinned memory.

        `hidden` [n, hidden]; `rows` [m] int64 on the device, of the states that were drawn from.
        """
        samplings = [self._asked[part.slot].sampling for part in work if part.samples]
        scored = [i for i, s in enumerate(samplings) if s.logprobs is not None]
        num_top = [
            min(s.logprobs or 0, logits.shape[1]) for s in samplings if s.logprobs is not None
        ]
        logit_rows = [i for i, s in enumerate(samplings) if s.return_logits]
        hidden_rows = [i for i, s in enumerate(samplings) if s.return_hidden]
        parts: tuple[torch.Tensor, ...] = ()
        if scored:
            index = self._index(scored)
            found = logprobs(logits[index], self.tokens[index], max(num_top))
            parts = tuple(to_host(part) for part in found)
        raw = to_host(logits[self._index(logit_rows)]) if logit_rows else None
        states = hidden[rows[self._index(hidden_rows)]] if hidden_rows else None
        states = None if states is None else to_host(states.float())
        return Reports(scored, num_top, parts, logit_rows, raw, hidden_rows, states)

    def _index(self, rows: list[int]) -> torch.Tensor:
        """On the device without waiting for it, which indexing by a list does."""
        return upload(torch.tensor(rows, dtype=torch.int64), self._table.device)


def read_logprobs(reports: Reports, num_draws: int) -> list[TokenLogprobs | None]:
    """After the step: one entry a draw, or none at all if nobody asked."""
    if not reports.rows:
        return []
    found: list[TokenLogprobs | None] = [None] * num_draws
    drawn, ids, tops = (part.tolist() for part in reports.logprobs)
    for i, (row, k) in enumerate(zip(reports.rows, reports.num_top, strict=True)):
        found[row] = TokenLogprobs(drawn[i], ids[i][:k], tops[i][:k])
    return found


def read_logits(reports: Reports, num_draws: int) -> list[bytes | None]:
    return _read_rows(reports.logits, reports.logit_rows, num_draws)


def read_hidden(reports: Reports, num_draws: int) -> list[bytes | None]:
    return _read_rows(reports.hidden, reports.hidden_rows, num_draws)


def _read_rows(
    values: torch.Tensor | None, rows: Sequence[int], num_draws: int
) -> list[bytes | None]:
    """After the step: bytes of each of `values`, which are those of draws `rows`."""
    if values is None:
        return []
    found: list[bytes | None] = [None] * num_draws
    for value, row in zip(values, rows, strict=True):
        found[row] = value.numpy().tobytes()
    return found
