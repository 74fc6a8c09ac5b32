"""Order between ranks without their hosts: one word a rank, written and awaited by streams.

A rank's word counts the messages its main stream has completed. Pre-copies are not waited for by
it; what they bring is relied on by other ranks only after `MoveDone`.

    source       ... step 41 | word = 41 | step 42 ...
    destination  ... | wait until word >= 41 | pull ...

A wait is one warp that polls; it gives up after a bounded number of polls, says so in a word of its
own, and lets the stream go on: the host sees that word with the next result, and the generation
ends.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false

from collections.abc import Sequence

import torch

from nitsum.errors import WorkerDied
from nitsum.kernels.language import tl, triton
from nitsum.worker.cuda.state import upload
from nitsum.worker.cuda.symmetric import Shared

POLLS_PER_S = 1_000_000
"""About: a poll of a peer's memory takes one to two microseconds."""


@triton.jit(do_not_specialize=["max_polls"])
def _wait_for_words(addresses, waits, late, max_polls):
    """Program i waits for word `waits[2 i]` to reach `waits[2 i + 1]`."""
    rank = tl.load(waits + 2 * tl.program_id(0))
    wanted = tl.load(waits + 2 * tl.program_id(0) + 1)
    word = tl.load(addresses + rank).to(tl.pointer_type(tl.int32))
    # Counts wrap around after weeks; their difference does not care.
    missing = wanted - tl.atomic_add(word, 0, sem="acquire", scope="sys")
    polls = 0
    while (missing > 0) & (polls < max_polls):
        missing = wanted - tl.atomic_add(word, 0, sem="acquire", scope="sys")
        polls += 1
    if missing > 0:
        tl.store(late, rank + 1)


def flat_waits(after: Sequence[tuple[int, int]], rank: int) -> list[int]:
    """`[rank, count, rank, count, ..]` as int32, without `rank` itself."""
    pairs = [(other, (count + (1 << 31)) % (1 << 32) - (1 << 31)) for other, count in after]
    return [number for pair in pairs if pair[0] != rank for number in pair]


class Signals:
    """This rank's word and those of its peers."""

    def __init__(self, words: Shared, rank: int, timeout_s: float) -> None:
        """`words`: [1] int32 on every rank."""
        self._rank = rank
        self._own = words.own.view(torch.uint32)
        self._addresses = words.addresses()
        self._timeout_s = timeout_s
        self.late = torch.zeros(1, dtype=torch.int32, device=words.own.device)
        """0, or one more than the rank that did not come in time."""

    def write(self, count: int) -> None:
        """On the current stream: all before it is done, and is message `count`."""
        torch.ops.symm_mem.stream_write_value32_(self._own, 0, count & 0xFFFFFFFF)

    def wait(self, after: Sequence[tuple[int, int]]) -> None:
        """The current stream waits until each `(rank, count)` is reached; the own rank is left out,
        since one stream orders its messages."""
        others = flat_waits(after, self._rank)
        if not others:
            return
        waits = upload(torch.tensor(others, dtype=torch.int32), self._own.device)
        max_polls = round(self._timeout_s * POLLS_PER_S)
        _wait_for_words[(len(others) // 2,)](
            self._addresses, waits, self.late, max_polls, num_warps=1
        )

    def check(self, late: int) -> None:
        """Raise `WorkerDied` if `late`, read from the device, names a rank."""
        if late:
            raise WorkerDied(
                f"waited about {self._timeout_s:g} s for rank {late - 1} to complete a message."
            )
