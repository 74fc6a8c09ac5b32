"""Where KV goes when a block changes lanes: one pure function.

A block of tokens is cut over its heads into `num_units` units (U). At degree t its page on a rank
holds U/t consecutive units, or one unit that t/U ranks hold alike:

    U = 4, t = 2, ranks 0 and 1:     rank 0: [u0 u1]   rank 1: [u2 u3]
    U = 4, t = 4, ranks 0..3:        rank 0: [u0]  rank 1: [u2]  rank 2: [u1]  rank 3: [u3]
                                     (shards are taken in bit-reversed order)
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from nitsum.plan import Group
from nitsum.shape import units_per_page


class UnitMove(NamedTuple):
    """Unit `src_unit` of the page on `src_rank` becomes unit `dst_unit` of the page on `dst_rank`.

    Units are offsets inside the page. Equal ranks mean that the right rank has the bytes already.
    """

    src_rank: int
    src_unit: int
    dst_rank: int
    dst_unit: int


def page_units(group: Group, rank: int, num_units: int) -> range:
    """The block's units (0..U-1) that `rank` holds as a member of `group`."""
    shard = group.shard_of(rank)
    count = units_per_page(group.degree, num_units)
    first = shard * num_units // group.degree
    return range(first, first + count)


@cache
def moves(src: Group, dst: Group, num_units: int) -> tuple[UnitMove, ...]:
    """Every unit each destination rank needs, and the source rank that gives it.

    A destination that holds the unit already takes it from itself. Replicas (degree above U) share
    the sending: receivers of one unit take it from different holders where there are several.
    """
    holders = _holders(src, num_units)
    taken = dict.fromkeys(range(num_units), 0)
    result: list[UnitMove] = []
    for dst_rank in dst.ranks:
        for dst_unit, unit in enumerate(page_units(dst, dst_rank, num_units)):
            ranks = holders[unit]
            if dst_rank in ranks:
                src_rank = dst_rank
            else:
                src_rank = ranks[taken[unit] % len(ranks)]
                taken[unit] += 1
            src_unit = unit - page_units(src, src_rank, num_units).start
            result.append(UnitMove(src_rank, src_unit, dst_rank, dst_unit))
    return tuple(result)


def _holders(group: Group, num_units: int) -> list[list[int]]:
    holders: list[list[int]] = [[] for _ in range(num_units)]
    for rank in group.ranks:
        for unit in page_units(group, rank, num_units):
            holders[unit].append(rank)
    return holders
