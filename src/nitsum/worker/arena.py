"""The KV arena of a rank, and the views that make it the paged cache of any degree.

    kv  [2 (K, V), layers, units, heads_per_unit, block_tokens, head_dim]

A page of a lane at degree t is U/t consecutive, aligned units (at least one), so regrouping the
unit axis is a pure view; a mover sees the same memory as one row of bytes for each of K and V,
layer and unit.
"""

from __future__ import annotations

import torch

from nitsum.shape import Geometry
from nitsum.shared import Region


class Arena:
    """K and V of one rank: the own one, or a peer's."""

    def __init__(
        self,
        memory: Region | torch.Tensor,
        geometry: Geometry,
        num_units: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`memory` is a region of bytes, or a flat tensor of `dtype` on any device. `num_units` is
        a multiple of the geometry's units per block; raises if the memory is too small for them."""
        shape = geometry.shape
        self.num_units = num_units
        self._geometry = geometry
        sizes = (2, shape.num_layers, num_units, geometry.heads_per_unit, block_tokens)
        self._sizes = (*sizes, shape.head_dim)
        count = 2 * shape.num_layers * num_units * self._elements_per_row()
        if isinstance(memory, Region):
            memory = torch.frombuffer(memory.map(), dtype=dtype, count=count)
        self._kv = memory[:count].view(self._sizes)

    @property
    def size_bytes(self) -> int:
        return self._kv.numel() * self._kv.element_size()

    @property
    def unit_bytes(self) -> int:
        return self.size_bytes // self.num_units

    def pages(self, degree: int) -> Pages:
        """The arena as the paged cache of `degree`."""
        _, num_layers, num_units, heads, block_tokens, head_dim = self._sizes
        per_page = self._geometry.units_per_page(degree)
        view = self._kv.view(
            2, num_layers, num_units // per_page, per_page * heads, block_tokens, head_dim
        )
        return Pages(view)

    def unit_rows(self) -> torch.Tensor:
        """[2 * layers, units, elements of a unit in one layer]"""
        return self._kv.view(-1, self.num_units, self._elements_per_row())

    def _elements_per_row(self) -> int:
        return self._sizes[3] * self._sizes[4] * self._sizes[5]


class Pages:
    """`KvPages`: [2 (K, V), layers, pages, heads, block_tokens, head_dim] of some degree."""

    def __init__(self, kv: torch.Tensor) -> None:
        self.kv = kv
        self._keys = kv[0].unbind(0)
        self._values = kv[1].unbind(0)

    def keys(self, layer: int) -> torch.Tensor:
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        return self._values[layer]
