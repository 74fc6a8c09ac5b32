"""A step as one array of int32: all that crosses to the device for it, but for nothing else.

    [ slot, start, count, samples ] x width   the step's sequences, then padding
    [ table places .. ][ table values .. ]    page differences, one entry a page
    [ tokens .. ]                             of the joins, one after the other

Expanding it (positions, page numbers, the tokens themselves) is the device's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nitsum.messages import Pages, Step, Work

Ints = npt.NDArray[np.int32]

NUM_WORK = 4
"""Numbers a sequence's work takes."""


class Packed(NamedTuple):
    """The array and where its parts are; `joins` are slots and where the tokens of their rows are.

    The work comes first, at `NUM_WORK * width` numbers.
    """

    array: Ints
    width: int
    places: slice
    values: slice
    joins: tuple[tuple[int, slice], ...]


def pack(step: Step, member: int, width: int, max_pages: int) -> Packed:
    """`step` for the lane's `member`-th rank, its work padded to `width` sequences."""
    work = pack_work(step.work, width)
    places, values = pack_pages(step.pages, member, max_pages)
    tokens = [np.asarray(join.tokens, dtype=np.int32) for join in step.joins]
    parts = [work.reshape(-1), places, values, *tokens]
    starts = np.cumsum([0, *(len(part) for part in parts)])
    slices = [slice(int(a), int(b)) for a, b in pairwise(starts)]
    joins = tuple(
        (join.slot, part) for join, part in zip(step.joins, slices[3:], strict=True) if join.tokens
    )
    return Packed(np.concatenate(parts, dtype=np.int32), width, slices[1], slices[2], joins)


def pack_work(work: Sequence[Work], width: int) -> Ints:
    """[width, 4]: slot (-1: padding), start, num_tokens, samples."""
    packed = np.zeros((width, NUM_WORK), dtype=np.int32)
    packed[: len(work)] = [(w.slot, w.start, w.num_tokens, w.samples) for w in work]
    packed[len(work) :, 0] = -1
    return packed


def pack_pages(pages: Sequence[Pages], member: int, max_pages: int) -> tuple[Ints, Ints]:
    """Places in the flat table [slots * max_pages], and the page each is to hold."""
    places = [
        np.arange(len(p.pages[member]), dtype=np.int32) + (p.slot * max_pages + p.first)
        for p in pages
    ]
    values = [np.asarray(p.pages[member], dtype=np.int32) for p in pages]
    empty = np.empty(0, dtype=np.int32)
    return np.concatenate([empty, *places]), np.concatenate([empty, *values])
