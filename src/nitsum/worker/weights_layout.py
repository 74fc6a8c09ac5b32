"""Where each part of a checkpoint's tensors goes on one rank, and where each degree's shard lies.

Integers only. A rank holds shard `shard` of degree min_tp, in the order in which every wider
degree's shard inside it is one range:

    qkv      rows     [q heads of group 0, k 0, v 0 | q heads of group 1, k 1, v 1 | ...]
             or, with more ranks than KV heads (`splits_kv`), [q heads ...] and [k 0, v 0 | ...]
    o        columns  [q heads ...]
    gate_up  rows     [gate chunk 0, up chunk 0 | gate chunk 1, up chunk 1 | ...]     T chunks
    down     columns  [chunk 0 | chunk 1 | ...]
    vocab    rows     [token 0 | token 1 | ...]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nitsum.shape import Geometry


class Piece(NamedTuple):
    """`size` rows (or columns) of a checkpoint tensor from `src` on go to `dst` on."""

    dst: int
    src: int
    size: int


@dataclass(frozen=True)
class RankLayout:
    """Shard `shard` of degree `geometry.min_tp`."""

    geometry: Geometry
    shard: int

    # -- what the rank holds --

    @property
    def kv_heads(self) -> range:
        """KV heads, padded numbering."""
        return self.geometry.kv_heads(self.geometry.min_tp, self.shard)

    @property
    def q_heads(self) -> range:
        """Query heads, padded numbering: head j of group i is i * q_per_kv + j."""
        return self._part(self.geometry.num_kv_heads * self.geometry.q_per_kv)

    @property
    def qkv_rows(self) -> int:
        d = self.geometry.shape.head_dim
        return len(self.q_heads) * d + (0 if self.geometry.splits_kv else self.kv_rows)

    @property
    def kv_rows(self) -> int:
        return len(self.kv_heads) * 2 * self.geometry.shape.head_dim

    @property
    def o_columns(self) -> int:
        return len(self.q_heads) * self.geometry.shape.head_dim

    @property
    def mlp(self) -> range:
        return self._part(self.geometry.intermediate_size)

    @property
    def tokens(self) -> range:
        return self._part(self.geometry.vocab_size)

    def _part(self, size: int) -> range:
        count = size // self.geometry.min_tp
        return range(self.shard * count, (self.shard + 1) * count)

    # -- where it comes from --

    def q_pieces(self) -> list[Piece]:
        """Of q_proj's rows, into `qkv`."""
        d, stride = self.geometry.shape.head_dim, 2 * self.geometry.shape.head_dim
        if self.geometry.splits_kv:
            return self.o_pieces()
        first = self.kv_heads.start
        return [
            Piece(dst * d + (group - first) * stride, src * d, num * d)
            for group, dst, src, num in self._q_runs()
        ]

    def o_pieces(self) -> list[Piece]:
        """Of o_proj's columns, into `o`."""
        d = self.geometry.shape.head_dim
        return [Piece(dst * d, src * d, num * d) for _, dst, src, num in self._q_runs()]

    def _q_runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(group, first head here, first head in the checkpoint, number of heads): real ones."""
        shape, g = self.geometry.shape, self.geometry.q_per_kv
        for group in self.kv_heads:
            if group >= shape.num_kv_heads:
                continue
            start = max(group * g, self.q_heads.start)
            stop = min(group * g + shape.q_per_kv, self.q_heads.stop)
            if start < stop:
                src = group * shape.q_per_kv + start - group * g
                yield group, start - self.q_heads.start, src, stop - start

    def k_pieces(self) -> list[Piece]:
        """Of k_proj's rows, into `qkv` or `kv`."""
        d = self.geometry.shape.head_dim
        q = 0 if self.geometry.splits_kv else self.geometry.q_per_kv
        return [
            Piece((local * (q + 2) + q) * d, head * d, d)
            for local, head in enumerate(self.kv_heads)
            if head < self.geometry.shape.num_kv_heads
        ]

    def v_pieces(self) -> list[Piece]:
        return self._shifted(self.k_pieces(), self.geometry.shape.head_dim)

    def gate_pieces(self) -> list[Piece]:
        """Of gate_proj's rows, into `gate_up`: one piece per chunk, spread by twice its width."""
        width = self.geometry.intermediate_size // self.geometry.max_tp
        starts = range(self.mlp.start, self.mlp.stop, width)
        chunks = [range(start, start + width) for start in starts]
        real = [_clip(chunk, self.geometry.shape.intermediate_size) for chunk in chunks]
        return [
            Piece(2 * local * width, chunk.start, len(chunk))
            for local, chunk in enumerate(real)
            if chunk
        ]

    def up_pieces(self) -> list[Piece]:
        width = self.geometry.intermediate_size // self.geometry.max_tp
        return self._shifted(self.gate_pieces(), width)

    def down_pieces(self) -> list[Piece]:
        """Of down_proj's columns, into `down`."""
        return _whole(_clip(self.mlp, self.geometry.shape.intermediate_size))

    def vocab_pieces(self) -> list[Piece]:
        """Of the embedding's and lm_head's rows."""
        return _whole(_clip(self.tokens, self.geometry.shape.vocab_size))

    @staticmethod
    def _shifted(pieces: list[Piece], by: int) -> list[Piece]:
        return [piece._replace(dst=piece.dst + by) for piece in pieces]

    # -- where a degree's shard lies in it --

    def holds(self, degree: int, shard: int) -> bool:
        """Whether shard `shard` of `degree` lies inside what this rank has."""
        in_range = self.geometry.min_tp <= degree <= self.geometry.max_tp
        return in_range and shard * self.geometry.min_tp // degree == self.shard

    def cut(self, size: int, degree: int, shard: int) -> range:
        """That shard's part of a resident dimension of `size`."""
        parts = degree // self.geometry.min_tp
        count = size // parts
        return range(shard % parts * count, (shard % parts + 1) * count)

    def kv_cut(self, degree: int, shard: int) -> range:
        """That shard's rows of `kv`; above H ranks, several shards share a head."""
        rows = 2 * self.geometry.shape.head_dim
        heads = self.geometry.kv_heads(degree, shard)
        first = heads.start - self.kv_heads.start
        return range(first * rows, (first + len(heads)) * rows)


def _clip(part: range, size: int) -> range:
    return range(min(part.start, size), min(part.stop, size))


def _whole(part: range) -> list[Piece]:
    return [Piece(0, part.start, len(part))] if part else []
