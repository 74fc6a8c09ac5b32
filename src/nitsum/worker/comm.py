"""Collectives of one group through shared memory: what CPU ranks use.

Every member sums all partial results itself, in shard order, so all of them get the same bits.

    all_reduce, small:  write own partial | barrier | add up everybody's
    all_reduce, large:  write own partial | barrier | add up own slice into `sums` | barrier | copy
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import NamedTuple

import torch

from nitsum.errors import WorkerDied
from nitsum.plan import Group
from nitsum.shared import BarrierTimeout, CommLayout, GroupShared

LARGE_ELEMENTS = 1 << 16
"""From this size on, with four members or more, reading every partial costs more than a second
barrier: 4 ranks on 2 cores, float32, 159 against 240 microseconds at [8, 576], 410 against 406 at
[128, 576], 1217 against 901 at [512, 576]."""


class _Copy(NamedTuple):
    """One of the two copies of a group's areas."""

    partials: torch.Tensor  # [degree, max_tokens * hidden] float32
    sums: torch.Tensor  # [max_tokens * hidden] float32
    logits: torch.Tensor  # [max_samples * vocab] float32
    drawn: torch.Tensor  # [max_samples] int64


class GroupComm:
    """`Comm` for one rank as a member of `group`; not to be shared between threads."""

    def __init__(
        self,
        group: Group,
        rank: int,
        shared: GroupShared,
        layout: CommLayout,
        timeout_s: float,
        reverse_vocab: bool = False,
    ) -> None:
        """`reverse_vocab` plants the `wrong-vocab` fault."""
        self.group = group
        self.rank = rank
        self.timeout_s = timeout_s
        self._member = rank - group.leader
        self._shard = group.shard_of(rank)
        self._shared = shared
        self._layout = layout
        self._reverse_vocab = reverse_vocab
        self._turn = 0
        self._waited_s = 0.0

    @property
    def degree(self) -> int:
        return self.group.degree

    @property
    def shard(self) -> int:
        return self._shard

    @property
    def member(self) -> int:
        """This rank's place in the group, 0 being the leader."""
        return self._member

    @property
    def is_leader(self) -> bool:
        return self._member == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every member's `x` [n, hidden], in place; n up to the step's token budget."""
        if self.degree == 1:
            return x
        copy = self._next_copy()
        flat = x.view(-1)
        partials = copy.partials[:, : flat.numel()]
        partials[self._shard].copy_(flat)
        self._barrier()
        if self.degree == 2 or flat.numel() < LARGE_ELEMENTS:
            _add_up(partials, flat)
        else:
            self._add_up_in_slices(partials, copy.sums[: flat.numel()], flat)
        return x

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        """[m, V/t] of this shard in, float32 [m, V] in vocabulary order out.

        The result is shared memory: valid until the second next `gather_vocab`.
        """
        if self.degree == 1:
            return logits.float()
        width = logits.shape[1]
        place = self.degree - 1 - self._shard if self._reverse_vocab else self._shard
        num_elements = logits.shape[0] * width * self.degree
        whole = self._next_copy().logits[:num_elements].view(logits.shape[0], -1)
        whole[:, place * width : (place + 1) * width] = logits
        self._barrier()
        return whole

    def broadcast(self, tokens: list[int] | None, num_tokens: int) -> list[int]:
        """The leader's `tokens` on every member; the others pass None and wait."""
        if self.degree == 1:
            assert tokens is not None
            return tokens
        drawn = self._next_copy().drawn[:num_tokens]
        if tokens is not None:
            drawn.copy_(torch.tensor(tokens))
        self._barrier()
        return drawn.tolist()

    def _add_up_in_slices(
        self, partials: torch.Tensor, sums: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Each shard adds up its part; all copy the whole. The same sums, bit for bit."""
        part = -(-out.numel() // self.degree)
        own = slice(self._shard * part, (self._shard + 1) * part)
        _add_up(partials[:, own], sums[own])
        self._barrier()
        out.copy_(sums)

    def _next_copy(self) -> _Copy:
        self._turn ^= 1
        return self._copies[self._turn]

    @cached_property
    def _copies(self) -> tuple[_Copy, _Copy]:
        first, second = (_views(self._shared, self._layout, which) for which in (0, 1))
        return first, second

    def take_waited_s(self) -> float:
        """How long this rank has waited for its peers since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _barrier(self) -> None:
        started_s = time.monotonic()
        try:
            self._shared.barrier.wait(self._member, self.timeout_s)
        except BarrierTimeout as timeout:
            missing = [self.group.leader + member for member in timeout.missing]
            raise WorkerDied(
                f"waited {self.timeout_s:g} s in {self.group} for rank(s) "
                f"{', '.join(map(str, missing)) or 'unknown'}."
            ) from None
        self._waited_s += time.monotonic() - started_s


def _add_up(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out[n] = partials[0] + partials[1] + ... ([t, n] float32), in that order, rounded once."""
    total = out if out.dtype == torch.float32 else torch.empty_like(partials[0])
    torch.add(partials[0], partials[1], out=total)
    for partial in partials[2:]:
        total.add_(partial)
    if total is not out:
        out.copy_(total)


def _views(shared: GroupShared, layout: CommLayout, which: int) -> _Copy:
    buffer = shared.buffer.map()
    areas = layout.copies()[which]
    num_hidden = layout.max_tokens * layout.hidden_size

    def view(dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)

    partials = view(torch.float32, areas.partials, layout.degree * num_hidden)
    return _Copy(
        partials.view(layout.degree, num_hidden),
        view(torch.float32, areas.sums, num_hidden),
        view(torch.float32, areas.logits, layout.max_samples * layout.vocab_size),
        view(torch.int64, areas.drawn, layout.max_samples),
    )
