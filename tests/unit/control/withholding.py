"""Ranks that hold back their acknowledgements."""

from __future__ import annotations

from nitsum.messages import Pull, RowPull


class Withholding:
    """A machine whose ranks acknowledge a copy when the test says so."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        """(rank, units) of every move; its id is its place."""

    def send_move(
        self, rank: int, pulls: list[Pull], rows: list[RowPull], after: list[tuple[int, int]]
    ) -> int:
        self.sent.append((rank, sum(len(pull.dst_units) for pull in pulls)))
        return len(self.sent)

    def num_settled(self, rank: int) -> int:
        return 0

    def num_sent(self, rank: int) -> int:
        return 0

    def take_slot(self) -> int | None:
        raise AssertionError("no request is moved")

    def free_slot(self, slot: int) -> None:
        raise AssertionError("no request is moved")
