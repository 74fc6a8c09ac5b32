"""A block of tokens in one lane's layout, and a request's table of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nitsum.kv.branches import Branch
from nitsum.plan import Group


@dataclass(frozen=True)
class Relocation:
    """Copy `count` units inside one rank; sent before anything that relies on the new place."""

    rank: int
    src_unit: int
    dst_unit: int
    count: int


class Block:
    """KV of `block_tokens` positions, laid out for `group`: one page on each of its ranks.

    `refs` counts the tables and switch waves that use it. A block without references stays cached
    under its hash until its room is needed. Only full blocks of known tokens have a hash; they are
    never written again, so they may be shared.
    """

    __slots__ = (
        "branch",
        "follower",
        "group",
        "hash",
        "level",
        "pages",
        "pins",
        "place",
        "refs",
    )

    def __init__(self, group: Group, pages: list[int]) -> None:
        self.group = group
        self.pages = pages
        """Page id on the group's i-th rank, counted in pages of the group's degree."""
        self.refs = 1
        self.pins = 0
        """While above 0 a peer may be reading it: it must not be relocated."""
        self.hash: int | None = None
        self.branch: Branch | None = None
        """Where in the tree of prefixes it was cached: see there. A block is of use only together
        with those before it."""
        self.place = 0
        """Blocks of its prefix before it."""
        self.follower: int | None = None
        """Hash of the block of its branch that comes after it, or came last."""
        self.level = 0
        """Tier level of its most urgent user; the least urgent are evicted first."""


class PageColumns(NamedTuple):
    """Pages of blocks in order, one column for each rank of their group."""

    columns: list[list[int]]
    num_relocations: int
    """Relocations there had been by then: after another one they may be wrong."""


class Table:
    """The blocks of one request, in order, all in the layout of `group`."""

    __slots__ = ("blocks", "group", "num_registered", "num_sent", "pages")

    def __init__(self, group: Group, blocks: list[Block]) -> None:
        self.group = group
        self.blocks = blocks
        self.num_registered = 0
        """Leading blocks that the prefix index was told about."""
        self.num_sent = 0
        """Leading blocks whose pages the workers know; a relocation sets it back."""
        self.pages: PageColumns | None = None
        """Pages of leading blocks, where they were worked out in advance."""


class Held(NamedTuple):
    """References and pins of one block that belong to something under way, not to a table."""

    block: Block
    refs: int
    pins: int


class Holder(Protocol):
    """What holds blocks while it is under way; the accounting asks it which."""

    def held(self) -> Iterator[Held]: ...
