"""`AttentionBackend` over FlashInfer, whose HND layout is our head-major pages.

It plans on the host from the step's lengths and keeps its plan in buffers of fixed address, so a
graph captured once serves every later plan. Page ids are flattened on the device.
"""

# pyright: reportMissingImports=false

from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch

from nitsum.errors import MissingDependency
from nitsum.kernels.attention import HostLengths, Sequences
from nitsum.kernels.language import jit, tl

DECODE_WORKSPACE_BYTES = 128 << 20
CHUNK_WORKSPACE_BYTES = 512 << 20
"""128 MiB do not hold the partial results of 2,048 tokens of 32 heads in a graph; these do not hold
those of 8,192 tokens."""


@jit
def _flatten_pages(page_table, page_starts, indices, table_stride, PAGES: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    first = tl.load(page_starts + s)
    count = tl.load(page_starts + s + 1) - first
    for start in range(0, count, PAGES):
        i = start + tl.arange(0, PAGES)
        page = tl.load(page_table + s * table_stride + i, mask=i < count)
        tl.store(indices + first + i, page, mask=i < count)


def flatten_pages(
    page_table: torch.Tensor, page_starts: torch.Tensor, indices: torch.Tensor
) -> None:
    """Pages of each sequence, one after the other: page_starts [s + 1] int32 -> indices int32."""
    _flatten_pages[(page_table.shape[0],)](
        page_table, page_starts, indices, page_table.stride(0), PAGES=512
    )


class FlashInferAttention:
    """Steps of exactly `num_seqs` sequences and up to `num_tokens` tokens.

    `decode_only` promises one token each; `tensor_cores` then picks FlashInfer's kernel for large
    groups. `kernel` is its `fa2` or `fa3`. Raises `MissingDependency` where it is not installed.
    """

    plans_on_host = True

    def __init__(
        self,
        num_seqs: int,
        num_tokens: int,
        max_pages: int,
        num_kv: int,
        q_per_kv: int,
        head_dim: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        decode_only: bool,
        tensor_cores: bool = True,
        kernel: str = "fa2",
        workspace: torch.Tensor | None = None,
    ) -> None:
        """`workspace` uint8 may be shared by all backends of a rank."""
        if workspace is None:
            size = DECODE_WORKSPACE_BYTES if decode_only else CHUNK_WORKSPACE_BYTES
            workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._decode_only = decode_only
        self._block_tokens = block_tokens
        self._heads = {
            "num_qo_heads": num_kv * q_per_kv,
            "num_kv_heads": num_kv,
            "page_size": block_tokens,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }
        self._head_dim = head_dim
        ints = {"dtype": torch.int32, "device": device}
        self._page_starts = torch.zeros(num_seqs + 1, **ints)
        self._indices = torch.zeros(num_seqs * max_pages, **ints)
        self._last_lengths = torch.ones(num_seqs, **ints)
        self._query_starts = torch.zeros(num_seqs + 1, **ints)
        self._wrapper = self._make_wrapper(workspace, tensor_cores, kernel)
        # Its buffers are sized by the first plan, so that is one of the largest step.
        whole = [num_tokens - num_seqs + 1, *[1] * (num_seqs - 1)]
        self._plan(HostLengths(whole, whole))

    def plan(self, sequences: Sequences, lengths: HostLengths | None) -> None:
        assert lengths is not None, "FlashInfer plans on the host"
        self._plan(lengths)
        flatten_pages(sequences.page_table, self._page_starts, self._indices)

    def run(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        self._wrapper.run(q.flatten(1, 2), (keys, values), out=out.flatten(1, 2))

    def _plan(self, lengths: HostLengths) -> None:
        pages = [-(-context // self._block_tokens) for context in lengths.contexts]
        page_starts = _starts(pages)
        last = [(context - 1) % self._block_tokens + 1 for context in lengths.contexts]
        where = (page_starts, self._indices[: int(page_starts[-1])], _ints(last))
        if self._decode_only:
            self._wrapper.plan(*where, head_dim=self._head_dim, **self._heads)
        else:
            query_starts = _starts(lengths.num_tokens)
            self._wrapper.plan(
                query_starts, *where, head_dim_qk=self._head_dim, causal=True, **self._heads
            )

    def _make_wrapper(self, workspace: torch.Tensor, tensor_cores: bool, kernel: str) -> Any:
        flashinfer = _flashinfer()
        if self._decode_only:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=tensor_cores,
                paged_kv_indptr_buffer=self._page_starts,
                paged_kv_indices_buffer=self._indices,
                paged_kv_last_page_len_buffer=self._last_lengths,
            )
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace,
            "HND",
            use_cuda_graph=True,
            qo_indptr_buf=self._query_starts,
            paged_kv_indptr_buf=self._page_starts,
            paged_kv_indices_buf=self._indices,
            paged_kv_last_page_len_buf=self._last_lengths,
            backend=kernel,
        )


def _flashinfer() -> Any:
    if find_spec("flashinfer") is None:
        raise MissingDependency("FlashInfer is not installed: install nitsum[gpu].")
    import flashinfer

    return flashinfer


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _starts(counts: list[int]) -> torch.Tensor:
    """[s + 1] int32 on the CPU: where each begins, and the end."""
    return _ints([0, *accumulate(counts)])
