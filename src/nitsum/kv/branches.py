"""The tree of cached prefixes: what follows what, and how much there is below each fork.

system prompt ─┬─ question ── answer ── question      a branch: blocks one after another
               ├─ question ── answer                  another one, which forks off the first
               └─ question                            after the system prompt, and a third
"""

from __future__ import annotations

MOST_FORKS = 8
"""Between a block and the first one of its prefix. What forks off after that is taken to be part of
its branch."""


class Branch:
    """Blocks of which each one follows the one before; where a block is followed by several, all
    but the first of them begin branches of their own.

    Blocks are counted over all layouts: a copy is another block.
    """

    __slots__ = ("at", "depth", "forks", "key", "num_blocks", "parent")

    def __init__(self, key: int, parent: Branch | None, at: int) -> None:
        self.key = key
        """Hash of its first block."""
        self.parent = parent
        """What it forks off from."""
        self.at = at
        """Blocks of its prefix before its first one."""
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.num_blocks = 0
        """Of this branch and of all that fork off from it."""
        self.forks: dict[int, int] = {}
        """Blocks of what forks off, by how many blocks of the prefix come before."""


class Branches:
    """All branches of which there are any blocks."""

    def __init__(self) -> None:
        self._by_key: dict[int, Branch] = {}

    def __contains__(self, key: int) -> bool:
        """Whether a block of this hash heads a branch."""
        return key in self._by_key

    def begin(self, key: int, parent: Branch | None, at: int) -> Branch:
        """The branch whose first block hashes to `key`, after the first `at` ones of a prefix that
        `parent` is the end of."""
        if parent is not None and parent.depth >= MOST_FORKS:
            return parent
        branch = self._by_key.get(key)
        if branch is None:
            branch = self._by_key[key] = Branch(key, parent, at)
        return branch

    def count(self, branch: Branch, change: int) -> None:
        """There are so many more blocks of a branch, or less."""
        while True:
            branch.num_blocks += change
            if not branch.num_blocks:
                self._by_key.pop(branch.key, None)
            parent, at = branch.parent, branch.at
            if parent is None:
                return
            below = parent.forks[at] = parent.forks.get(at, 0) + change
            if not below:
                del parent.forks[at]
            branch = parent
