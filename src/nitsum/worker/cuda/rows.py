"""Rows of peers, pulled by one kernel."""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch

from nitsum.kernels.language import tl, triton
from nitsum.messages import RowPull
from nitsum.worker.cuda.state import upload
from nitsum.worker.cuda.symmetric import Shared

_BLOCK = 1024


@triton.jit
def _pull_rows(addresses, own, pulls, row_tokens, BLOCK: tl.constexpr):
    """Program (i, j) copies block j of pull i: [src_rank, src_slot, dst_slot, num_tokens]."""
    pull = pulls + 4 * tl.program_id(0)
    peer = tl.load(addresses + tl.load(pull)).to(tl.pointer_type(tl.int32))
    src_slot = tl.load(pull + 1).to(tl.int64)
    dst_slot = tl.load(pull + 2).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.load(pull + 3)
    tokens = tl.load(peer + src_slot * row_tokens + offsets, mask=mask)
    tl.store(own + dst_slot * row_tokens + offsets, tokens, mask=mask)


class RowPuller:
    """Rows [slots, row_tokens] int32 of all ranks."""

    def __init__(self, rows: Shared) -> None:
        self._own = rows.own
        self._addresses = rows.addresses()

    def pull(self, pulls: Sequence[RowPull]) -> int:
        """On the current stream, into slots nobody uses yet; returns bytes."""
        if not pulls:
            return 0
        table = [[p.src_rank, p.src_slot, p.dst_slot, p.num_tokens] for p in pulls]
        numbers = torch.tensor(table, dtype=torch.int32)
        longest = max(pull.num_tokens for pull in pulls)
        grid = (len(pulls), max(1, triton.cdiv(longest, _BLOCK)))
        _pull_rows[grid](
            self._addresses,
            self._own,
            upload(numbers, self._own.device),
            self._own.shape[1],
            BLOCK=_BLOCK,
        )
        return 4 * sum(pull.num_tokens for pull in pulls)
