"""Grammars on a GPU rank: what was drawn comes to the host, and a mask goes back before the draw.

    main    step n | new tokens to host | layers of step n + 1 ............ | mask | draw
    host                                 \\- read, consume, compute, upload -/

The mask of a step needs the token of the step before, which is known when that step has ended. The
layers of the next one are queued by then, so that the host computes masks beside them: the device
waits only where masks take longer than a forward pass. Requests with grammars therefore join every
step, and others in the batch keep their graphs; a step without a grammar does none of this.

Only the leader of a lane draws, so only it reads and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nitsum.kernels.mask_logits import mask_logits
from nitsum.messages import Join, Work
from nitsum.request import SamplingParams
from nitsum.worker.cuda.state import pin_empty, to_host, upload
from nitsum.worker.grammar import Answer, GrammarMasks, num_words


@dataclass
class HeldSlot:
    """A slot whose answer keeps to a grammar, and the answer as far as the host has read it."""

    num_prompt: int
    num_known: int
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list[int])


class MaskedDraw(NamedTuple):
    """One draw of a step, and how many tokens in front of it are new to the host."""

    row: int
    slot: int
    num_new: int


class Reading(NamedTuple):
    """New tokens on their way to the host; `tokens` [n] int32, one draw's after the other's."""

    draws: list[MaskedDraw]
    tokens: torch.Tensor


class DeviceGrammars:
    """What the host knows of the answers that keep to a grammar."""

    def __init__(self, rows: torch.Tensor, masks: GrammarMasks, vocab_size: int) -> None:
        """`rows` [slots, row_tokens] int32, where drawn tokens go."""
        self._rows = rows
        self._masks = masks
        self._vocab_size = vocab_size
        self._held: dict[int, HeldSlot] = {}

    def warm_up(self, logits: torch.Tensor) -> None:
        """Load the kernel, by a mask that changes nothing of `logits` [m, V], and the tokenizer."""
        lines = torch.full((1, 1 + num_words(self._vocab_size)), -1, dtype=torch.int32)
        lines[0, 0] = 0
        mask_logits(logits, upload(lines, logits.device))
        self._masks.load_early()

    def join(self, joins: Sequence[Join]) -> None:
        """These slots start anew; what is in their rows is read when it is needed."""
        for join in joins:
            if join.sampling.grammar is None:
                self._held.pop(join.slot, None)
            else:
                self._held[join.slot] = HeldSlot(join.num_prompt, join.num_known, join.sampling)

    def read(self, work: Sequence[Work]) -> Reading | None:
        """Start copying what masks of this step need to know; None if it masks nothing.

        On the current stream, before the step: rows are then as the step before left them.
        """
        draws: list[MaskedDraw] = []
        places: list[int] = []
        for row, part in enumerate(part for part in work if part.samples):
            held = self._held.get(part.slot)
            position = part.start + part.num_tokens
            if held is None or position < held.num_known:
                continue  # free, or the token is given
            del held.tokens[position - held.num_prompt :]
            first = held.num_prompt + len(held.tokens)
            at = part.slot * self._rows.shape[1]
            places.extend(range(at + first, at + position))
            draws.append(MaskedDraw(row, part.slot, position - first))
        return Reading(draws, self._to_host(places)) if draws else None

    def _to_host(self, places: list[int]) -> torch.Tensor:
        """What stands in `places` of the flat rows."""
        if not places:
            return torch.empty(0, dtype=torch.int32)
        index = upload(torch.tensor(places, dtype=torch.int64), self._rows.device)
        return to_host(self._rows.view(-1)[index])

    def mask(self, logits: torch.Tensor, reading: Reading) -> None:
        """Forbid in float32 `logits` [m, V] what must not come next; the reading has arrived."""
        words = num_words(self._vocab_size)
        lines = pin_empty(len(reading.draws), 1 + words)
        numbers = lines.numpy()
        numbers[:, 0] = [draw.row for draw in reading.draws]
        self._masks.fill(numbers[:, 1:], self._answers(reading))
        mask_logits(logits, lines.to(logits.device, non_blocking=True))

    def _answers(self, reading: Reading) -> list[Answer]:
        """All answers of the reading, what is new taken in."""
        tokens: list[int] = reading.tokens.tolist()
        answers: list[Answer] = []
        first = 0
        for _, slot, num_new in reading.draws:
            held = self._held[slot]
            held.tokens += tokens[first : first + num_new]
            answers.append(Answer(slot, held.sampling, held.tokens))
            first += num_new
        return answers
