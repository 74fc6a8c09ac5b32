"""What a rank's device knows of its sequences: rows, page tables, and how each one samples."""

from __future__ import annotations

import torch

from nitsum.worker.cuda.packing import NUM_WORK, Packed
from nitsum.worker.cuda.symmetric import Shared

PINNED_EACH = 16
"""Buffers of one size in use at once: a few of each step and move under way."""
CAPACITY = 1 << 16
"""Numbers of the upload buffer (at least); a step with longer prompts gets memory of its own."""


class DeviceState:
    """Rows (mapped by peers) and page tables of one rank, and the work of the step at hand."""

    def __init__(self, rows: Shared, block_tokens: int, max_num_seqs: int) -> None:
        """`rows`: [slots, row_tokens] int32."""
        slots, row_tokens = rows.own.shape
        device = rows.own.device
        self.rows = rows.own
        self.block_tokens = block_tokens
        self.max_pages = -(-row_tokens // block_tokens)
        self.tables = torch.zeros(slots, self.max_pages, dtype=torch.int32, device=device)
        capacity = max(CAPACITY, 2 * NUM_WORK * max_num_seqs)
        self._upload = torch.empty(capacity, dtype=torch.int32, device=device)
        self.work = self._upload[: NUM_WORK * max_num_seqs].view(max_num_seqs, NUM_WORK)

    @property
    def num_bytes(self) -> int:
        return self.rows.nbytes + self.tables.nbytes + self._upload.nbytes

    def take_in(self, packed: Packed) -> None:
        """On the current stream: upload, then page differences and rows of joins."""
        numbers = self._to_device(packed)
        if packed.values.stop > packed.values.start:
            places = numbers[packed.places].long()
            self.tables.view(-1).index_copy_(0, places, numbers[packed.values])
        for slot, part in packed.joins:
            self.rows[slot, : part.stop - part.start].copy_(numbers[part])

    def _to_device(self, packed: Packed) -> torch.Tensor:
        """The array on the device; its work at the head of the upload buffer in any case."""
        host = pinned(torch.from_numpy(packed.array))
        if len(host) <= len(self._upload):
            return self._upload[: len(host)].copy_(host, non_blocking=True)
        numbers = host.to(self.rows.device, non_blocking=True)
        head = NUM_WORK * packed.width
        self._upload[:head].copy_(numbers[:head])
        return numbers


def upload(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, by way of pinned memory, which torch keeps until it has been read."""
    return pinned(numbers).to(device, non_blocking=True)


def pinned(numbers: torch.Tensor) -> torch.Tensor:
    """A copy the device can read by itself, where there is a device."""
    return numbers.pin_memory() if torch.cuda.is_available() else numbers


def warm_up_pinned() -> None:
    """Pinned buffers of every size that steps need, kept by torch from then on: asking the driver
    for one can wait until the device is idle."""
    sizes = [1 << power for power in range(9, 21)]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes * PINNED_EACH]
    del held


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A pinned copy that is complete when the current stream has come to here."""
    return pin_empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)


def pin_empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Host memory the device can reach by itself, where there is a device."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def record_event() -> torch.cuda.Event:
    """Where the current stream is now; can be timed against others."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
