"""What lies where in one rank's arena."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nitsum.kv.blocks import Block
from nitsum.kv.units import UnitPool

if TYPE_CHECKING:
    from nitsum.kv.cache import ArenaShape


def whole_blocks(
    arena: ArenaShape,
    pool: UnitPool,
    owners: list[Block | None],
    rank: int,
    units: range,
    takes: Callable[[Block], bool],
) -> list[Block] | None:
    """The blocks with pages in a range of units, in order; None unless these pages, each of one
    block that `takes` accepts, and free units are all there is in it.

    `owners`: by first unit of a page, the block placed there last. It may be gone, or moved, since.
    """
    refs = pool.refs
    found: list[Block] = []
    unit, last = units.start, units.stop
    while unit < last:
        if not refs[unit]:
            unit += 1
            continue
        block = owners[unit]
        if block is None or not takes(block):
            return None
        width = arena.page_units(block.group)
        end = unit + width
        if block.pages[rank - block.group.leader] * width != unit or end > last:
            return None  # moved since, or larger than the range
        if max(refs[unit:end]) > 1:
            return None
        found.append(block)
        unit = end
    return found
