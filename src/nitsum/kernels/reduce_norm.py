"""The end of a row-parallel product as one kernel: sum over the lane, residual addition, RMSNorm.

One program a row. A member writes its part of the row into every peer's inbox, raises a flag behind
it, waits for the peers' flags and reads its own inbox, which is local memory by then:

    member 0   part -> inbox of 1 | flag 1 += 1 | wait for flag 0 | part + inbox -> residual, norm
    member 1   part -> inbox of 0 | flag 0 += 1 | wait for flag 1 | inbox + part -> residual, norm

Each row has two inboxes, used in turn, and a count of its calls, which says which one it is and
which count a flag must reach. A member that has seen a peer's flag of one call knows that the peer
is through with the call before, so an inbox is free again when its turn comes.

Programs wait only for the same row's program of a peer, and rows start in order, so a grid larger
than the GPU cannot deadlock.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch

from nitsum.kernels.language import jit, next_power_of_2, tl
from nitsum.kernels.norm import num_warps


@jit
def _reduce_add_rms_norm(
    part, inboxes, own_inbox, flags, own_flags, calls, residual, weight, out, size, capacity, eps,
    MEMBER: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    dtype = residual.dtype.element_ty
    call = tl.load(calls + row)
    # inbox [2 (turns), peers, capacity, size]
    turn = ((call & 1) * (MEMBERS - 1)).to(tl.int64)
    mine = tl.load(part + row.to(tl.int64) * size + cols, mask=inside, other=0.0)
    for peer in tl.static_range(MEMBERS):
        if peer != MEMBER:
            inbox = tl.load(inboxes + peer).to(tl.pointer_type(dtype))
            place = MEMBER - 1 if peer < MEMBER else MEMBER
            at = ((turn + place) * capacity + row) * size
            tl.store(inbox + at + cols, mine, mask=inside)
    tl.debug_barrier()  # all threads have written, or the release would speak for one of them
    for peer in tl.static_range(MEMBERS):
        if peer != MEMBER:
            flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + row * MEMBERS + MEMBER
            tl.atomic_add(flag, 1, sem="release", scope="sys")
    before = tl.load(residual + row.to(tl.int64) * size + cols, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for member in tl.static_range(MEMBERS):
        if member == MEMBER:
            total += mine.to(tl.float32)
        else:
            flag = own_flags + row * MEMBERS + member
            # Counts wrap around after days; their difference does not care.
            missing = call + 1 - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            while missing > 0:
                missing = call + 1 - tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            place = member - 1 if member > MEMBER else member
            at = ((turn + place) * capacity + row) * size
            total += tl.load(own_inbox + at + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(calls + row, call + 1)
    # Rounded as the reference does: the sum, the residual, the normed value before it is scaled.
    summed = (before.to(tl.float32) + total.to(dtype).to(tl.float32)).to(dtype)
    tl.store(residual + row.to(tl.int64) * size + cols, summed, mask=inside)
    x = summed.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)).to(dtype).to(tl.float32)
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * size + cols, (normed * scale).to(dtype), mask=inside)


class ReduceNorm:
    """Buffers of one group of ranks, and the kernel over them.

    `inbox` [2 * (members - 1) * capacity, hidden] in the model's dtype and `flags`
    [capacity * members] int32, zeroed, are this rank's; `inboxes` and `all_flags` [members] int64
    are the addresses of every member's as this rank sees them. Steps of up to `capacity` rows are
    summed; all members call in the same order with as many rows.
    """

    def __init__(
        self,
        member: int,
        inbox: torch.Tensor,
        inboxes: torch.Tensor,
        flags: torch.Tensor,
        all_flags: torch.Tensor,
    ) -> None:
        self._member = member
        self._members = inboxes.numel()
        self.capacity = flags.numel() // self._members
        self._inbox, self._inboxes = inbox, inboxes
        self._flags, self._all_flags = flags, all_flags
        self._calls = torch.zeros(self.capacity, dtype=torch.int32, device=flags.device)

    def __call__(
        self, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`residual += sum of parts` in place; its norm, scaled. All contiguous [n, hidden]."""
        n, size = part.shape
        assert n <= self.capacity, "more rows than the inbox holds"
        assert part.is_contiguous(), "rows follow each other"
        out = torch.empty_like(residual)
        block = next_power_of_2(size)
        if n:
            _reduce_add_rms_norm[(n,)](
                part, self._inboxes, self._inbox, self._all_flags, self._flags, self._calls,
                residual, weight, out, size, self.capacity, eps,
                MEMBER=self._member, MEMBERS=self._members, BLOCK=block,
                num_warps=num_warps(block),
            )  # fmt: skip
        return out
