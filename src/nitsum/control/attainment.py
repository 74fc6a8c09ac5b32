"""Which share of a tier's requests have their first token in time: an M/G/m queue before lanes that
are alike, whose wait has an exponential tail. A part of the score (`score.py`)."""

from __future__ import annotations

from math import exp, log, sqrt
from typing import NamedTuple

from nitsum.control.load import TierLoad

STEPS_BEFORE = 1.5
"""Steps under way that a new request waits for: one runs, one may be queued behind it."""
SLACK_ORDER = 0.15
"""Waits against those of first come first served: requests with the least slack go first, and
targets grow with prompts, so few wait long."""
SHED_AT = 0.9
"""In overload requests that are late anyway give way, so those in time see a queue like this."""
SHARING = 4
"""How late in filling a lane a prompt is slowed down to the pace that answers leave it: with the
share of time that the lane works to this power. This and `SLACK_ORDER` are calibrated on simulated
static layouts (`benchmarks/score_error.py`)."""


class Queue(NamedTuple):
    """One tier's requests before the lanes of a class."""

    num_lanes: int
    busy: float
    """Share of time that each lane works."""
    step_s: float
    """Mean of a lane's step, and of those on the same ranks that may come first."""
    service_s: float
    """Of one request on a lane that is busy."""


def attained(load: TierLoad, alone: list[float], queue: Queue) -> tuple[float, float]:
    """Share of the requests whose first token is in time; P99 of that time. `alone` is how long
    each of the load's probes takes on an idle lane, seconds."""
    busy, service_s = min(SHED_AT, queue.busy), queue.service_s
    wait_chance = busy ** (sqrt(2.0 * (queue.num_lanes + 1)) - 1.0)
    spread = SLACK_ORDER * (1.0 + load.prompt_cv2) / 2
    decay_s = service_s * spread / (queue.num_lanes * (1.0 - busy))
    before_s = STEPS_BEFORE * queue.step_s * busy
    met = p99 = 0.0
    for (prompt_tokens, ttft_s), own_s in zip(load.probes, alone, strict=True):
        # On a full lane a prompt goes at the pace that the step bound leaves.
        shared_s = service_s * prompt_tokens / load.prompt_tokens
        if shared_s > own_s:
            own_s += (shared_s - own_s) * busy**SHARING
        if own_s > p99:
            p99 = own_s
        if ttft_s is None:
            met += 1.0
            continue
        slack_s = ttft_s - (own_s + before_s)
        if slack_s >= 0.0:
            met += 1.0 - wait_chance * exp(-slack_s / decay_s)
    tail_s = decay_s * log(wait_chance / 0.01) if wait_chance > 0.01 else 0.0
    return met / max(1, len(load.probes)), p99 + before_s + tail_s
