"""A soak with locust: two tiers, while the plan changes under them."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

SECONDS = int(os.environ.get("NITSUM_SOAK_S", "40"))


def test_two_tiers_and_switches(served, tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "locust", "--headless", "-f", str(here / "locustfile.py")]
    flags = ["-H", served.url, "-u", "5", "-r", "5", "-t", f"{SECONDS}s", "--stop-timeout", "60"]
    soak = subprocess.Popen(
        [*command, *flags, "--csv", str(tmp_path / "soak")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    switches = _switch_until_done(served.url, soak)
    output, _ = soak.communicate()
    assert soak.returncode == 0, output[-4000:]
    rows = {row["Name"]: row for row in csv.DictReader((tmp_path / "soak_stats.csv").open())}
    assert all(int(rows[tier]["Request Count"]) > 0 for tier in ("priority", "flex"))
    assert rows["Aggregated"]["Failure Count"] == "0", output[-4000:]
    assert switches, "no plan was switched"
    state = httpx.get(f"{served.url}/load").json()
    assert (state["num_running"], max(state["kv_used"])) == (0, 0)


def _switch_until_done(url: str, soak: subprocess.Popen[str]) -> list[str]:
    plans = httpx.get(f"{url}/admin/plans").json()["plans"]
    done: list[str] = []
    while soak.poll() is None:
        plan = plans[(len(done) + 1) % len(plans)]
        answer = httpx.post(f"{url}/admin/plans/switch", json={"plan": plan}, timeout=120)
        assert answer.status_code == 200, answer.text
        done.append(plan)
        time.sleep(5)
    return done
