"""Collectives of one group through symmetric memory, all of them on the current stream.

    reduce_norm    push to all, sum, add, norm                          one kernel
    all_reduce     small: copy in, sum of everybody's on arrival        one kernel
                   large: copy in, each sums its part for all           a copy, one kernel
    gather_vocab   write own slice | barrier | read everybody's
    broadcast      leader writes   | barrier | the others read

One buffer for each use suffices: every step has all-reduces before its gather, and a member takes
part in those only after it has read the last step's buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nitsum.kernels.reduce_norm import ReduceNorm
from nitsum.plan import Group
from nitsum.worker.cuda.symmetric import Shared, SymmetricMemory

ONE_SHOT_BYTES = 512 << 10
"""Divided by the degree: up to here each rank reads all partial sums itself. On 2x H100, one shot
takes 10.5 us for 256 KiB and two shots 8.3 us, but those need a copy of 2 us before."""


FUSED_ROWS = 1024
"""Of lanes wider than two: above, everybody reading everybody's part is more traffic than summing
in two shots. Two ranks exchange the same bytes either way, and fuse steps of any size."""


def fused_rows(degree: int, max_tokens: int) -> int:
    """How many rows of a step are summed, added and normed by one kernel."""
    return max_tokens if degree == 2 else min(max_tokens, FUSED_ROWS // degree)


@dataclass(frozen=True)
class CommSizes:
    """What the largest step needs."""

    max_tokens: int
    hidden_size: int
    max_samples: int
    vocab_size: int
    """Padded."""
    dtype: torch.dtype


class CudaComm:
    """`Comm` for one rank as a member of `group`."""

    def __init__(
        self,
        group: Group,
        rank: int,
        memory: SymmetricMemory,
        sizes: CommSizes,
        reverse_vocab: bool = False,
    ) -> None:
        """Allocates; all members at the same point. `reverse_vocab` plants the `wrong-vocab` fault.

        A group of one has no buffers.
        """
        self.group = group
        self.rank = rank
        self._shard = group.shard_of(rank)
        self._reverse_vocab = reverse_vocab
        self.reduce_norm: ReduceNorm | None = None
        if group.degree == 1:
            return
        self.reduce_norm = self._make_reduce_norm(memory, sizes)
        width = sizes.vocab_size // group.degree
        self._hidden = memory.allocate((sizes.max_tokens * sizes.hidden_size,), sizes.dtype, group)
        self._logits = memory.allocate((sizes.max_samples * width,), sizes.dtype, group)
        self._drawn = memory.allocate((sizes.max_samples,), torch.int32, group)

    @property
    def degree(self) -> int:
        return self.group.degree

    @property
    def shard(self) -> int:
        return self._shard

    @property
    def member(self) -> int:
        """This rank's place in the group, 0 being the leader."""
        return self.rank - self.group.leader

    @property
    def is_leader(self) -> bool:
        return self.member == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every member's `x` [n, hidden], contiguous; in `x` or in the group's buffer."""
        if self.degree == 1:
            return x
        part = self._hidden.own[: x.numel()].view(x.shape)
        name = self._hidden.group_name
        if x.nbytes * self.degree <= ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce_copy_out(part, x, "sum", name, x)
        part.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", name)

    def _make_reduce_norm(self, memory: SymmetricMemory, sizes: CommSizes) -> ReduceNorm:
        degree, rows = self.degree, fused_rows(self.degree, sizes.max_tokens)
        shape = (2 * (degree - 1) * rows, sizes.hidden_size)
        inbox = memory.allocate(shape, sizes.dtype, self.group)
        flags = memory.allocate((rows * degree,), torch.int32, self.group)
        return ReduceNorm(self.member, inbox.own, inbox.addresses(), flags.own, flags.addresses())

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        """[m, V/t] of this shard in, [m, V] in vocabulary order out."""
        if self.degree == 1:
            return logits
        rows, width = logits.shape
        self._logits.own[: logits.numel()].view(rows, width).copy_(logits)
        self._barrier(self._logits)
        whole = logits.new_empty(rows, width * self.degree)
        for member, peer in enumerate(self._logits.peers):
            place = self._place(self.group.shard_of(self.group.leader + member))
            part = peer[: logits.numel()].view(rows, width)
            whole[:, place * width : (place + 1) * width].copy_(part)
        return whole

    def broadcast(self, tokens: torch.Tensor) -> None:
        """[m] int32: what the leader has in it, on every member."""
        if self.degree == 1:
            return
        count = tokens.numel()
        if self.is_leader:
            self._drawn.own[:count].copy_(tokens)
        self._barrier(self._drawn)
        if not self.is_leader:
            tokens.copy_(self._drawn.peers[0][:count])

    def _place(self, shard: int) -> int:
        return self.degree - 1 - shard if self._reverse_vocab else shard

    def _barrier(self, shared: Shared) -> None:
        shared.handle.barrier(channel=0)
