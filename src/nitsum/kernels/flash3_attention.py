"""`AttentionBackend` over FlashAttention 3 as vLLM ships it, where that library is installed.

Its layout is token-major, `[pages, block_tokens, heads, head_dim]`, but it takes any strides, so
our head-major pages go in transposed. It plans on the device.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from nitsum.errors import MissingDependency
from nitsum.kernels.attention import HostLengths, Sequences

LIBRARY = "_vllm_fa3_C.abi3.so"
PATH_VARIABLE = "NITSUM_FA3_LIBRARY"


def find_library() -> Path | None:
    """Where the library is: named by NITSUM_FA3_LIBRARY, or inside an installed vLLM."""
    named = os.environ.get(PATH_VARIABLE)
    if named:
        return Path(named)
    spec = find_spec("vllm")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "vllm_flash_attn" / LIBRARY
        if path.is_file():
            return path
    return None


def load_library() -> None:
    """Make its operators known to torch; raises `MissingDependency` when there is none."""
    path = find_library()
    if path is None or not path.is_file():
        raise MissingDependency(
            f"FlashAttention 3 was not found: install vllm, or set {PATH_VARIABLE} to the path of "
            f"its {LIBRARY}."
        )
    torch.ops.load_library(str(path))


class Flash3Attention:
    """Steps of `num_seqs` sequences with at most `max_query_tokens` tokens and `max_context` each.

    Both bounds hold for every replay of a graph captured with them; the tighter they are, the
    better it spreads the work.
    """

    plans_on_host = False

    def __init__(
        self,
        num_kv: int,
        q_per_kv: int,
        head_dim: int,
        block_tokens: int,
        dtype: torch.dtype,
        *,
        max_query_tokens: int,
        max_context: int,
    ) -> None:
        load_library()
        self._num_kv = num_kv
        self._q_per_kv = q_per_kv
        self._head_dim = head_dim
        self._block_tokens = block_tokens
        self._dtype = dtype
        self._max_query_tokens = max_query_tokens
        self._max_context = max_context
        self._sequences: Sequences | None = None
        self._schedule: torch.Tensor | None = None

    def plan(self, sequences: Sequences, lengths: HostLengths | None = None) -> None:
        self._sequences = sequences
        self._schedule = torch.ops._vllm_fa3_C.get_scheduler_metadata(
            sequences.num_seqs, self._max_query_tokens, self._max_context,
            self._num_kv * self._q_per_kv, self._num_kv, self._head_dim, self._head_dim,
            self._dtype, sequences.contexts, sequences.query_starts, None, None, None, None,
            self._block_tokens, 0, True, -1, -1, False, 0, None, 0,
        )  # fmt: skip

    def run(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        sequences = self._sequences
        assert sequences is not None, "plan() comes first"
        torch.ops._vllm_fa3_C.fwd(
            q.flatten(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
            None, None, None, out.flatten(1, 2),
            sequences.query_starts, None, None, None, sequences.contexts,
            self._max_query_tokens, self._max_context, sequences.page_table,
            None, None, None, None, None, None, None, None,
            self._head_dim**-0.5, True, -1, -1, 0.0, True, self._schedule, 0, None, 0,
            None, 1, 0, None,
        )  # fmt: skip
