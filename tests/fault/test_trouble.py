"""Mixed calls through kills and switches: every answer is whole and the right one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fault.calls import mixed_calls
from tests.fault.leaks import held, leaked
from tests.fault.running import RunningServer
from tests.fault.trouble import Trouble, in_peace, in_trouble

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

NUM_CALLS = int(os.environ.get("NITSUM_FAULT_CALLS", "48"))
NUM_KILLS = int(os.environ.get("NITSUM_FAULT_KILLS", "2"))
NUM_SWITCHES = int(os.environ.get("NITSUM_FAULT_SWITCHES", "4"))
RANKS = os.environ.get("NITSUM_FAULT_RANKS", "2")

PATIENT = """
- {name: priority, level: 0, ttft_s: 600, tpot_s: 60, price: 2}
- {name: default, level: 1, ttft_s: 600, tpot_s: 60}
- {name: flex, level: 2, deadline_s: 6000, price: 0.5}
- {name: batch, level: 3, deadline_s: 6000, price: 0.5, min_share: 0.05}
"""
"""Targets that a restart does not break, so that nothing is refused or served as less."""


def test_answers_survive_kills_and_switches(checkpoint: Path, tmp_path: Path) -> None:
    tiers = tmp_path / "tiers.yaml"
    tiers.write_text(PATIENT)
    flags = ("--ranks", RANKS, "--kv-memory", "8MiB", "--tiers", str(tiers))
    with RunningServer(checkpoint, tmp_path, *flags) as server:
        reference = in_peace(server, mixed_calls(NUM_CALLS, seed=1))
        assert [answer.error for answer in reference if not answer.is_whole] == []
        before = held(server)
        outcome = in_trouble(server, reference, Trouble(NUM_KILLS, NUM_SWITCHES))
        assert outcome.wrong() == {}
        assert (outcome.num_kills, outcome.num_switches) == (NUM_KILLS, NUM_SWITCHES)
        assert leaked(before, held(server)) == {}
