"""Deadlines of a request, worked out once: the order inside a tier never changes after that."""

from __future__ import annotations

from math import inf

from nitsum.sched.estimate import Work
from nitsum.sequence import Sequence
from nitsum.tier import Tier

TIGHTEST = 0.75
"""A request behind its pace is given no less than this part of it per step: it catches up, and
prefills still get something."""
LOOSEST = 2.0
"""A request ahead of its pace feels no longer gap than this many token times."""
MARGIN = 0.05
"""Tokens are meant to be there this part of the pace before they are due: a prediction errs."""
DELIVERY_S = 2e-3
"""And so much earlier, since the way to the client is not always equally long: of priority requests
held to exactly their pace, 2 to 4% ended less than 3 ms too late (docs/benchmarks.md)."""
CHAIN_PART = 0.25
"""Part of the slack its chain has left that one call may use up: others are to follow."""


def set_targets(
    sequence: Sequence, tier: Tier, work: Work, chain_deadline_s: float | None = None
) -> None:
    """When the sequence must start and how fast it must go, on the lane `work` is priced for.

    A target the client named orders inside the tier; it promises nothing.
    """
    request = sequence.request
    if tier.deadline_s is not None and request.ttft_target_s is None:
        due_s = request.arrival_s + tier.deadline_s - work.latency_s
    else:
        due_s = request.arrival_s + (request.ttft_target_s or tier.ttft_s or 0.0)
    sequence.first_due_s = sequence.missed_after_s = due_s
    sequence.lost_after_s = due_s - work.prefill_s
    sequence.latest_start_s = sequence.lost_after_s
    sequence.pace_s = _pace(sequence, tier)
    if chain_deadline_s is not None:
        slack_s = chain_deadline_s - work.prefill_s - work.latency_s - request.arrival_s
        sequence.chain_start_s = request.arrival_s + min(slack_s, CHAIN_PART * slack_s)
        sequence.latest_start_s = min(sequence.latest_start_s, sequence.chain_start_s)
        sequence.missed_after_s = inf


def _pace(sequence: Sequence, tier: Tier) -> float | None:
    """A looser pace the client named is taken; a tighter one than the tier's is not promised."""
    if tier.tpot_s is None:
        return None
    return max(tier.tpot_s, sequence.request.tpot_target_s or 0.0)
