"""Which attention a rank uses, and one of it for each size of step.

`NITSUM_ATTENTION` chooses: triton, flash3, flashinfer, or auto, which takes FlashAttention 3 where
it is installed and Triton elsewhere. FlashInfer plans on the host, 0.2 to 1.6 ms a step, for
kernels that are no faster here (docs/performance.md), so it has to be asked for.
"""

from __future__ import annotations

import os
from typing import Literal, cast, get_args

import torch

from nitsum.errors import ConfigError
from nitsum.kernels.attention import AttentionBackend
from nitsum.kernels.flash3_attention import Flash3Attention, find_library
from nitsum.kernels.flashinfer_attention import FlashInferAttention
from nitsum.kernels.triton_attention import TritonAttention
from nitsum.messages import WorkerSpec
from nitsum.model.ops import Heads

Choice = Literal["auto", "triton", "flash3", "flashinfer"]
Library = Literal["triton", "flash3", "flashinfer"]
VARIABLE = "NITSUM_ATTENTION"


def chosen_library(wanted: str | None = None) -> Library:
    """Raises `ConfigError` when the variable names none."""
    wanted = wanted or os.environ.get(VARIABLE, "auto")
    if wanted not in get_args(Choice):
        raise ConfigError(f"{VARIABLE} is {wanted!r}; use one of {', '.join(get_args(Choice))}.")
    if wanted == "auto":
        return "triton" if find_library() is None else "flash3"
    return cast(Library, wanted)


class AttentionMaker:
    """Attention of one lane's heads. Graphs of one size share what is made for it: one step's plan
    is used up before the next one's."""

    def __init__(
        self, heads: Heads, spec: WorkerSpec, max_pages: int, device: torch.device
    ) -> None:
        self._heads = heads
        self._spec = spec
        self._max_pages = max_pages
        self._device = device
        self._library: Library = chosen_library()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._made: dict[tuple[int, bool], AttentionBackend] = {}

    def __call__(self, num_seqs: int, decode_only: bool) -> AttentionBackend:
        """For steps of `num_seqs` sequences; `decode_only` promises one token each."""
        key = (num_seqs, decode_only)
        if key not in self._made:
            self._made[key] = self._make(num_seqs, decode_only)
        return self._made[key]

    def _make(self, num_seqs: int, decode_only: bool) -> AttentionBackend:
        if self._library == "triton":
            return TritonAttention(
                num_seqs, *self._sizes, self._device, decode_only=decode_only, side=self._side
            )
        max_tokens = 1 if decode_only else self._spec.max_batch_tokens
        if self._library == "flash3":
            return Flash3Attention(
                *self._sizes,
                self._spec.block_tokens,
                self._dtype,
                max_query_tokens=max_tokens,
                max_context=self._spec.max_model_len,
            )
        return FlashInferAttention(
            num_seqs,
            num_seqs if decode_only else max_tokens,
            self._max_pages,
            *self._sizes,
            self._spec.block_tokens,
            self._dtype,
            self._device,
            decode_only=decode_only,
        )

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self._heads.num_kv, self._heads.q_per_kv, self._heads.head_dim

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._spec.dtype)
