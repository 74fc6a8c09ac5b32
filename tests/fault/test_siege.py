"""A server among malformed requests: it refuses them, and goes on as if nothing were."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.calls import mixed_calls
from tests.fault.leaks import held, leaked
from tests.fault.model import PATIENT
from tests.fault.running import RunningServer
from tests.fault.siege import besiege

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1200)]

NUM_REQUESTS = 400


def test_malformed_requests_harm_nobody(checkpoint: Path, tmp_path: Path) -> None:
    tiers = tmp_path / "tiers.yaml"
    tiers.write_text(PATIENT)
    flags = ("--ranks", "2", "--kv-memory", "8MiB", "--tiers", str(tiers), "--client-timeout", "5")
    with RunningServer(checkpoint, tmp_path, *flags, "--log-level", "warning") as server:
        calls = mixed_calls(12, seed=3, num_tokens=(5, 20))
        besiege(server, calls, 100, seed=1)  # warm: thread pools, caches, the ledger
        before = held(server)
        workers = server.workers()
        siege = besiege(server, calls, NUM_REQUESTS)
        print(siege.statuses, siege.growth_mb(), siege.calm_s, siege.besieged_s, siege.seconds)
        assert siege.stuck == []
        assert siege.server_errors() == {}, "\n".join(server.lines[-80:])
        assert siege.wrong == []
        assert not siege.grows(), siege.memory_mb
        assert server.workers() == workers, "a worker died"
        assert leaked(before, held(server)) == {}
        assert [line for line in server.lines if "Traceback" in line or "ERROR" in line] == []
