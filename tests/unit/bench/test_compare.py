"""A comparison that can fail, and the verdict drawn from it."""

import math
from collections import Counter

import pytest
import torch

from nitsum.bench.parity import Report, Tolerance
from nitsum.bench.reference import Difference, from_bytes


def logits() -> torch.Tensor:
    return torch.randn(5, 31, generator=torch.Generator().manual_seed(0))


def difference(ours: torch.Tensor) -> Difference:
    found = Difference()
    found.add("r0", [3, 1, 4, 1, 5], ours, logits())
    return found


def test_equal_logits_differ_by_nothing():
    same = difference(logits())
    assert (same.nll_difference, same.logits, same.num_positions) == (0.0, 0.0, 5)


def test_the_worst_position_is_named():
    ours = logits()
    ours[2, 7] += 0.5
    found = difference(ours)
    assert found.worst == "r0, answer token 2"
    assert found.logits == pytest.approx(0.5 / logits()[2].abs().max().item())
    assert found.nll_difference > 0


def test_nan_is_no_pass():
    ours = logits()
    ours[4, 0] = math.nan
    found = difference(ours)
    assert found.logits == math.inf
    assert not Report(tolerance=Tolerance(1.0, 1.0)).within(found)


def test_nothing_compared_is_no_pass():
    assert not Report().within(Difference())


def test_bytes_become_rows():
    expected = logits()
    rows = [row.numpy().tobytes() for row in expected]
    assert torch.equal(from_bytes(rows), expected)


def test_the_verdict():
    good, bad = Difference(1, 1.0, 1.0), Difference(1, 1.0, 2.0)
    assert Report(against={"static": good}).verdict == "pass"
    assert Report(against={"static": good}, unproven=["no switch"]).verdict == "not proven"
    assert Report(against={"static": good, "transformers": bad}).verdict == "fail"
    assert Report(against={"static": good}, errors=["r1 is short"]).verdict == "fail"


def test_figures_name_what_was_moved():
    figures = Report(moved=Counter(decode=3), against={"static": Difference(1, 1.0, 1.0)}).figures
    assert figures["num_moved_in_decode"] == 3
    assert figures["num_moved_in_paused"] == 0
    assert figures["nll_difference_vs_static"] == 0.0
