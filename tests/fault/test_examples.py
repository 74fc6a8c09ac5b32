"""The examples run, against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nitsum.cli.build import build_engine_config, build_tiers
from nitsum.cli.settings import ServeSettings
from nitsum.cli.sources import from_file
from tests.fault.running import RunningServer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")
    with RunningServer(checkpoint, folder, "--ranks", "2", "--kv-memory", "32MiB") as running:
        yield running


@pytest.mark.fault
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("tiers.py", ["asked priority, served", "asked flex, served flex on TP1@"]),
        ("agent.py", ["3 calls in", "tokens were cached"]),
        ("batch_job.py", ["Rhine: ", "Danube: ", "Elbe: "]),
        ("embeddings.py", ["The Rhine flows", "vectors of 48 numbers"]),
        ("curl.sh", ["x-nitsum-plan: 2xTP1", "data: [DONE]", '"ok":true', '"to_plan":"TP2"']),
    ],
)
def test_programs(server: RunningServer, program: str, words: list[str]) -> None:
    path = EXAMPLES / program
    command = ["sh", str(path)] if path.suffix == ".sh" else [sys.executable, str(path)]
    surroundings = {**os.environ, "NITSUM_URL": server.url}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one for one in words if one not in done.stdout] == [], done.stdout


def test_the_configuration_is_right() -> None:
    known, problems = from_file(ServeSettings, str(EXAMPLES / "server.yaml"))
    assert problems == []
    settings = ServeSettings(
        ranks=int(str(known["ranks"].value)),
        plans=tuple(known["plans"].value),  # type: ignore[arg-type]
    )
    assert [plan.name for plan in build_engine_config(settings, Path("m")).plans.plans] == [
        "2xTP1",
        "TP2",
    ]
    entries = yaml.safe_load((EXAMPLES / "tiers.yaml").read_text())
    assert [tier.name for tier in build_tiers(tuple(entries))] == [
        *("priority", "default", "flex", "batch")
    ]


def test_litellm_names_are_tiers() -> None:
    config = yaml.safe_load((EXAMPLES / "litellm.yaml").read_text())
    tiers = {
        one["model_name"]: one["litellm_params"]["service_tier"] for one in config["model_list"]
    }
    assert tiers == {"fast": "priority", "cheap": "flex"}
