"""The compiled core decides what the interpreted one decides, to the last digit.

Skipped until `make compiled` has built it, of these very sources.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "src/nitsum"
COMPILED = REPOSITORY / ".venv-compiled/bin/python"

MIX = f"mix:{REPOSITORY / 'benchmarks/workloads/mixed.yaml'}"
LANES = ["--model", "Llama-3.1-8B", "--machine", "8xA100-80GB", "--trace", MIX, "--duration", "3"]
SMALL = ["--model", "Qwen2.5-0.5B", "--machine", "2xA100-80GB", "--duration", "20", "--rate", "4"]
TIGHT = ["--small-samples", "--max-batch-tokens", "512", "--tiers", "priority=1,default=1,flex=1"]
RUNS = {
    "eight lanes": [*LANES, "--plan", "8xTP1", "--rate", "50"],
    "fcfs": [*LANES, "--plan", "8xTP1", "--rate", "50", "--policy", "fcfs"],
    "a controller": [*LANES, "--plans", "8xTP1,TP8", "--rate", "30"],
    "an overlay": [*SMALL, *TIGHT, "--plan", "TP2/2xTP1"],
    "switches": [*SMALL, *TIGHT, "--plans", "TP2,2xTP1", "--switch-at", "5:2xTP1,10:TP2"],
    "roles": [*SMALL, *TIGHT, "--plan", "TP1-prefill+TP1-decode"],
}
PLANNING = """
import random
from nitsum.bench.planning import fleet_of, random_load
fleet, draw = fleet_of(128), random.Random(1)
for _ in range(20):
    print(fleet.choose(random_load(draw, 12.0, 128)))
"""
KIND = "from nitsum.compiled import core_kind; print(core_kind())"


def packages() -> dict[str, Path]:
    """Where each core's package lies."""
    installed = sorted(REPOSITORY.glob(".venv-compiled/lib/python*/site-packages/nitsum"))
    return {"interpreted": SOURCES} | ({"compiled": installed[0]} if installed else {})


def contents(package: Path) -> dict[str, bytes]:
    """What was written by hand or measured: sources, and the data that they read."""
    made = (".pyc", ".so")
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in made]
    return {str(path.relative_to(package)): path.read_bytes() for path in files}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    found = packages()
    if "compiled" not in found or not COMPILED.exists():
        pytest.skip("the core was not compiled here: make compiled")
    if contents(found["compiled"]) != contents(SOURCES):
        pytest.skip("the compiled core is of other sources: make compiled")


def output(kind: str, *words: str) -> str:
    """What a Python with that core prints."""
    python = str(COMPILED) if kind == "compiled" else sys.executable
    environment = os.environ | {"PYTHONPATH": str(packages()[kind].parent)}
    done = subprocess.run(
        [python, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_core_is_what_it_is_called():
    assert output("compiled", "-c", KIND) == "compiled\n"
    assert output("interpreted", "-c", KIND) == "interpreted\n"


@pytest.mark.parametrize("name", RUNS)
def test_simulated_runs_are_equal_event_by_event(name: str, tmp_path: Path):
    runs: dict[str, list[Any]] = {}
    for kind in ("interpreted", "compiled"):
        events = tmp_path / f"{kind}.jsonl"
        command = "import sys; from nitsum.cli import main; sys.exit(main())"
        output(kind, "-c", command, "simulate", *RUNS[name], "--events", str(events))
        # As values: of an int where a float is meant, mypyc makes one, and then 22 reads 22.0.
        runs[kind] = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum(event["type"] == "StepEnded" for event in runs["interpreted"]) > 50
    assert runs["compiled"] == runs["interpreted"]


def test_plans_chosen_for_a_fleet_are_equal():
    assert output("compiled", "-c", PLANNING) == output("interpreted", "-c", PLANNING)
