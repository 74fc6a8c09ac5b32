"""Which prompts go back when not all can be through in time.

On one machine, with everything due at its own time, as many jobs as possible are on time if they
are taken by due time and, whenever one would be late, the longest so far is given up (Moore, "An n
job, one machine sequencing algorithm for minimizing the number of late jobs", 1968). What is given
up is still served, behind the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import NamedTuple

from nitsum.sequence import Sequence


class Job(NamedTuple):
    """A prompt under way."""

    due_s: float
    seconds: float
    """Of the lane, until it is through on its own."""
    sequence: Sequence
    stays: bool = False
    """It is not to be given up."""


def given_up(jobs: Iterable[Job], start_s: float) -> set[Sequence]:
    """The fewest jobs without which all others are on time, from `start_s` on."""
    dropped: set[Sequence] = set()
    taken: list[tuple[float, int, Sequence]] = []
    end_s = start_s
    for number, job in enumerate(sorted(jobs, key=_due)):
        end_s += job.seconds
        if not job.stays:
            heappush(taken, (-job.seconds, number, job.sequence))
        while end_s > job.due_s and taken:
            seconds, _, sequence = heappop(taken)
            end_s += seconds
            dropped.add(sequence)
    return dropped


def _due(job: Job) -> float:
    return job.due_s
