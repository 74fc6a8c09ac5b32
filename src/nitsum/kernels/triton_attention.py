"""`AttentionBackend` that needs nothing but Triton, and plans on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nitsum.kernels import chunk_attention as chunk
from nitsum.kernels import decode_attention as decode
from nitsum.kernels.attention import HostLengths, Sequences


class TritonAttention:
    """Steps of up to `num_seqs` sequences. `decode_only` promises one token each.

    Steps of both kinds attend single tokens on the stream `side`, if there is one, while prompts
    are attended on the current stream: memory bounds the former and products the latter, so that
    both together take a quarter less than one after the other.
    """

    plans_on_host = False

    def __init__(
        self,
        num_seqs: int,
        num_kv: int,
        q_per_kv: int,
        head_dim: int,
        device: torch.device | str,
        *,
        decode_only: bool,
        side: torch.cuda.Stream | None = None,
        decode_tuning: decode.Tuning | None = None,
        chunk_tuning: chunk.Tuning | None = None,
    ) -> None:
        self._num_kv = num_kv
        self._mixed = not decode_only
        self._side = side
        block_n = 128 if head_dim <= 128 else 64  # of wider heads, more do not fit shared memory
        self._decode_tuning = decode_tuning or decode.Tuning(block_n)
        self._chunk_tuning = chunk_tuning or chunk.Tuning(block_n=block_n)
        self._num_sms = _num_sms(torch.device(device))
        self._num_programs = self._decode_tuning.programs_per_sm * self._num_sms
        self._buffers = decode.decode_buffers(
            num_seqs, num_kv, q_per_kv, head_dim, device, self._num_programs
        )
        self._sequences: Sequences | None = None

    def plan(self, sequences: Sequences, lengths: HostLengths | None = None) -> None:
        self._sequences = sequences
        decode.plan_parts(
            sequences, self._buffers, self._num_kv, self._num_programs, mixed=self._mixed
        )

    def run(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        sequences = self._sequences
        assert sequences is not None, "plan() comes first"

        def attend_single() -> None:
            decode.decode_attention(
                q, keys, values, sequences, self._buffers, out,
                mixed=self._mixed, tuning=self._decode_tuning,
            )  # fmt: skip

        def attend_chunks() -> None:
            chunk.chunk_attention(
                q, keys, values, sequences, out,
                num_sms=self._num_sms, mixed=True, tuning=self._chunk_tuning,
            )  # fmt: skip

        if self._mixed:
            _launch_both(attend_single, self._side, attend_chunks)
        else:
            attend_single()


def _launch_both(
    beside: Callable[[], None], side: torch.cuda.Stream | None, here: Callable[[], None]
) -> None:
    """`beside` on `side`, `here` on the current stream, which goes on when both have ended."""
    if side is None:
        beside()
        here()
        return
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        beside()
    here()
    current.wait_stream(side)


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
