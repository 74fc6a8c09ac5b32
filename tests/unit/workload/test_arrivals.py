"""Arrival processes have the rate, the burstiness and the repeatability they promise."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from itertools import islice, pairwise, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.workload.arrivals import RateStep, client_arrivals, client_rates, gamma_arrivals, warp


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.1, 50.0), st.sampled_from((0.0, 0.5, 1.0, 2.0)))
def test_gaps_have_the_mean_and_variation_asked_for(seed: int, rate: float, cv: float) -> None:
    times = list(islice(gamma_arrivals(random.Random(seed), rate, cv), 8000))
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 0.0
    assert statistics.fmean(gaps) * rate == pytest.approx(1.0, rel=0.12)
    measured_cv = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert measured_cv == pytest.approx(cv, rel=0.15, abs=1e-6)


@given(st.floats(0.1, 100.0), st.integers(1, 50), st.floats(0.0, 2.0))
def test_clients_share_the_rate(rate: float, num_clients: int, skew: float) -> None:
    rates = client_rates(rate, num_clients, skew)
    assert sum(rates) == pytest.approx(rate)
    assert rates == sorted(rates, reverse=True)


def arrivals(seed: str = "s", rate: float = 20.0) -> Iterator[tuple[float, int]]:
    return client_arrivals(seed, rate, cv=1.0, num_clients=5, skew=1.0)


def test_merged_clients_come_in_order_and_repeat_by_seed() -> None:
    first = list(islice(arrivals(), 500))
    assert first == sorted(first)
    assert {client for _, client in first} == {0, 1, 2, 3, 4}
    assert first == list(islice(arrivals(), 500))
    assert first != list(islice(arrivals("other"), 500))


def test_a_client_is_not_disturbed_by_another() -> None:
    few = client_arrivals("s", 2.0, cv=1.0, num_clients=2, skew=0.0)
    many = client_arrivals("s", 4.0, cv=1.0, num_clients=4, skew=0.0)

    def of_client_0(stream: Iterator[tuple[float, int]]) -> list[float]:
        return [t for t, c in takewhile(lambda x: x[0] < 50, stream) if c == 0]

    assert of_client_0(few) == of_client_0(many)


def test_warped_rates_follow_the_steps() -> None:
    steps = [RateStep(0.0, 1.0), RateStep(100.0, 0.0), RateStep(200.0, 5.0), RateStep(300.0, 0.5)]
    times = [at for at, _ in warp(arrivals(), steps, 500.0)]
    assert times == sorted(times)

    def rate(low: float, high: float) -> float:
        return sum(low <= t < high for t in times) / (high - low)

    assert rate(100, 200) == 0.0
    assert rate(0, 100) == pytest.approx(20, rel=0.15)
    assert rate(200, 300) == pytest.approx(100, rel=0.1)
    assert rate(300, 500) == pytest.approx(10, rel=0.2)
    assert max(times) < 500.0


def test_a_constant_rate_is_left_alone() -> None:
    plain = list(takewhile(lambda x: x[0] < 30.0, arrivals()))
    assert list(warp(arrivals(), [RateStep(0.0, 1.0)], 30.0)) == plain
