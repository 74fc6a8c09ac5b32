"""Both measurements from end to end on a tiny model; what they measured is not judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nitsum.cli import main
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama")
    return str(folder)


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_engine(model: str, capsys: pytest.CaptureFixture[str]):
    flags = ["--threads", "1", "--rounds", "1", "--answer-tokens", "8", "--batches", "1,3"]
    assert main(["bench", "engine", model, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"date", "command", "versions", "hardware", "notes", "figures"}
    figures = result["figures"]
    assert {"vs_transformers_b1", "vs_transformers_b3", "decode_ms_b3", "floor_ms_b1"} <= set(
        figures
    )
    assert all(value >= 0 for value in figures.values())


def test_switch(model: str, capsys: pytest.CaptureFixture[str]):
    flags = ["--ranks", "2", "--switches", "2", "--streams", "3", "--answer-tokens", "64"]
    assert main(["bench", "switch", model, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    figures = result["figures"]
    assert result["different"] == []
    assert figures["num_switches"] == 4
    assert figures["moved_bytes_per_switch"] > 0
    assert figures["num_streams"] == (
        figures["num_streams_same_text"] + figures["num_streams_close_call"]
    )
