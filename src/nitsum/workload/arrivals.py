"""When requests arrive: renewal processes, sums of clients, rates that change over time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple


def gamma_arrivals(rng: random.Random, rate_per_s: float, cv: float) -> Iterator[float]:
    """Endless arrival times with Gamma gaps of mean 1 / rate and coefficient of variation `cv`.

    cv 1 is a Poisson process, above 1 is bursty, 0 is a metronome (with a random start).
    """
    mean = 1.0 / rate_per_s
    at = rng.random() * mean
    while True:
        yield at
        at += mean if cv == 0.0 else rng.gammavariate(cv**-2, mean * cv**2)


def client_rates(rate_per_s: float, num_clients: int, skew: float) -> list[float]:
    """`rate_per_s` shared out: the i-th client's share is proportional to 1 / i^skew."""
    shares = [1.0 / (i + 1) ** skew for i in range(num_clients)]
    total = sum(shares)
    return [rate_per_s * share / total for share in shares]


def client_arrivals(
    seed: str, rate_per_s: float, *, cv: float, num_clients: int, skew: float
) -> Iterator[tuple[float, int]]:
    """(time, client) of several clients, merged; each has gaps and a random stream of its own.

    Many bursty clients add up to a load that is smooth as a whole and bursty for each.
    """
    rates = client_rates(rate_per_s, num_clients, skew)
    streams = [
        _labelled(gamma_arrivals(random.Random(f"{seed}/client/{i}"), rate, cv), i)
        for i, rate in enumerate(rates)
    ]
    return heapq.merge(*streams)


def _labelled(times: Iterator[float], client: int) -> Iterator[tuple[float, int]]:
    for at in times:
        yield at, client


class RateStep(NamedTuple):
    """From `at_s` on, the rate is multiplied by `factor`."""

    at_s: float
    factor: float


def warp(
    arrivals: Iterator[tuple[float, int]], steps: Sequence[RateStep], duration_s: float
) -> Iterator[tuple[float, int]]:
    """Stretch a stationary process so that its rate follows `steps`; ends at `duration_s`.

    Process time runs `factor` times as fast as real time, so burstiness is kept as it is. `steps`
    start at 0 and rise in time.
    """
    place = 0
    process_s = 0.0
    for at, client in arrivals:
        while True:
            step = steps[place]
            end_s = steps[place + 1].at_s if place + 1 < len(steps) else duration_s
            process_end_s = process_s + (end_s - step.at_s) * step.factor
            if at < process_end_s:
                yield step.at_s + (at - process_s) / step.factor, client
                break
            if place + 1 >= len(steps):
                return
            place, process_s = place + 1, process_end_s
