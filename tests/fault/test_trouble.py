"""Mixed calls through kills and switches: every answer is whole and the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.calls import mixed_calls
from tests.fault.leaks import held, leaked
from tests.fault.model import PATIENT
from tests.fault.running import RunningServer
from tests.fault.trouble import Trouble, in_peace, in_trouble

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

NUM_CALLS = 48
NUM_KILLS = 2
NUM_SWITCHES = 4


def test_answers_survive_kills_and_switches(checkpoint: Path, tmp_path: Path) -> None:
    tiers = tmp_path / "tiers.yaml"
    tiers.write_text(PATIENT)
    flags = ("--ranks", "2", "--kv-memory", "8MiB", "--tiers", str(tiers))
    with RunningServer(checkpoint, tmp_path, *flags) as server:
        reference = in_peace(server, mixed_calls(NUM_CALLS, seed=1))
        assert [answer.error for answer in reference if not answer.is_whole] == []
        before = held(server)
        outcome = in_trouble(server, reference, Trouble(NUM_KILLS, NUM_SWITCHES))
        assert outcome.wrong() == {}
        assert (outcome.num_kills, outcome.num_switches) == (NUM_KILLS, NUM_SWITCHES)
        assert leaked(before, held(server)) == {}
