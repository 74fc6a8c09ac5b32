"""A buddy allocator over the units of one rank's arena, with a reference count per unit.

Pages of every degree come out of the same units: a page of `2**order` units starts at a multiple
of its size. A unit may belong to several pages at once: when a lane's degree doubles, the kept
half of a page is the new page, in place, and both own its units until the old one is let go.
"""

from __future__ import annotations

from collections.abc import Iterable


class UnitPool:
    """Units `0 .. num_units - 1` of one rank; `num_units` is cut to whole pages of `max_order`."""

    def __init__(self, num_units: int, max_order: int) -> None:
        self.max_order = max_order
        self.num_units = num_units >> max_order << max_order
        self.num_free = self.num_units
        self.refs = [0] * self.num_units
        # free[k] holds the starts of free, unmergeable blocks of 2**k units. Dicts keep insertion
        # order, so the same calls give the same units in every run.
        self.free: list[dict[int, None]] = [{} for _ in range(max_order + 1)]
        for start in range(self.num_units - (1 << max_order), -1, -(1 << max_order)):
            self.free[max_order][start] = None

    def alloc(self, order: int) -> int | None:
        """The first of `2**order` consecutive units, each with one reference; None when full.

        The smallest block that fits is split, so larger ones last.
        """
        found = order
        while not self.free[found]:
            found += 1
            if found > self.max_order:
                return None
        start, _ = self.free[found].popitem()
        while found > order:
            found -= 1
            self.free[found][start + (1 << found)] = None
        self._take(start, 1 << order)
        return start

    def alloc_many(self, order: int, count: int) -> list[int] | None:
        """`count` times `alloc`, or nothing when they are not all to be had."""
        if count << order > self.num_free:
            return None
        free = self.free[order]
        if len(free) >= count:  # nothing to split
            refs, width = self.refs, 1 << order
            starts = [free.popitem()[0] for _ in range(count)]
            for start in starts:
                refs[start : start + width] = [1] * width
            self.num_free -= count << order
            return starts
        taken: list[int] = []
        while len(taken) < count:
            found = self.alloc(order)
            if found is None:
                for start in reversed(taken):
                    self.release(start, 1 << order)
                return None
            taken.append(found)
        return taken

    def num_pages(self, order: int) -> int:
        """How often `alloc` would succeed now."""
        return sum(len(free) << found for found, free in enumerate(self.free[order:]) if free)

    def claim(self, start: int, order: int) -> bool:
        """Take exactly this free block, wherever it lies inside a larger one; False if in use."""
        found, block = order, start
        while block not in self.free[found]:
            found += 1
            if found > self.max_order:
                return False
            block = start >> found << found
        del self.free[found][block]
        while found > order:
            found -= 1
            half = 1 << found
            keep_upper = start >= block + half
            self.free[found][block if keep_upper else block + half] = None
            block += half if keep_upper else 0
        self._take(start, 1 << order)
        return True

    def retain(self, start: int, count: int) -> None:
        """One more reference to each of `count` units in use."""
        for unit in range(start, start + count):
            assert self.refs[unit] > 0, f"unit {unit} is free"
            self.refs[unit] += 1

    def retain_pages(self, starts: Iterable[int], count: int) -> None:
        """One more reference to each of `count` units from each start on, all in use."""
        refs = self.refs
        if count == 1:
            for start in starts:
                assert refs[start] > 0, f"unit {start} is free"
                refs[start] += 1
            return
        for start in starts:
            self.retain(start, count)

    def release(self, start: int, count: int) -> None:
        """One reference less; units without any return to the pool and merge with free buddies."""
        refs = self.refs
        if count == 1 == refs[start] and not self.max_order:
            refs[start] = 0
            self.num_free += 1
            self.free[0][start] = None
            return
        if count == 1 or all(n == 1 for n in refs[start : start + count]):
            assert refs[start] > 0, f"unit {start} is free already"
            shared = refs[start] - 1
            refs[start : start + count] = [shared] * count
            if not shared:
                self._free_block(start, count.bit_length() - 1)
            return
        for unit in range(start, start + count):
            self.release(unit, 1)

    def _take(self, start: int, count: int) -> None:
        self.refs[start : start + count] = [1] * count
        self.num_free -= count

    def _free_block(self, start: int, order: int) -> None:
        self.num_free += 1 << order
        while order < self.max_order:
            buddy = start ^ (1 << order)
            if buddy not in self.free[order]:
                break
            del self.free[order][buddy]
            start = min(start, buddy)
            order += 1
        self.free[order][start] = None
