"""`nitsum doctor`: what it reads, and what it makes of machines of all kinds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nitsum.cli import main
from nitsum.cli.machine import Gpu, Machine, choose, examine, read_gpus, read_links

LISTING = """0, NVIDIA H200, 143771, 0, 9.0, 580.159.04
1, NVIDIA H200, 143771, 20000, 9.0, 580.159.04
"""
MATRIX = """\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\t0-31
GPU1\tNV18\t X \t0-31

Legend:
  X    = Self
"""
PACKAGES: dict[str, str | None] = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "flashinfer-python": None,
    "safetensors": "0.8.0",
    "transformers": "5.17.0",
    "gguf": "0.19.0",
}
GPU = Gpu(0, "NVIDIA H200", 143771, 0, "9.0", "580.159.04")
MACHINE = Machine("3.12", "Linux", 16, PACKAGES, (GPU,), (), "13.0", 1, (), {})


def test_listings_of_nvidia_smi_are_read():
    first, second = read_gpus(LISTING)
    assert first == GPU
    assert (second.index, second.used_mib) == (1, 20000)
    assert read_links(MATRIX) == ("GPU0 - GPU1: NV18",)
    assert read_gpus("") == read_links("") == ()


def kinds(machine: Machine) -> list[str]:
    return [finding.kind for finding in examine(machine)]


def test_a_machine_that_has_all_is_told_so():
    assert kinds(MACHINE) == ["ok"]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (replace(MACHINE, cuda=None), "CPU build"),
        (replace(MACHINE, gpus_seen_by_torch=0), "sees 0 of 1"),
        (replace(MACHINE, unlinked=((0, 1),)), "cannot map"),
        (replace(MACHINE, gpus=(replace(GPU, capability="7.5"),)), "compute capability 7.5"),
        (replace(MACHINE, packages={**PACKAGES, "torch": None}), "nothing can be served"),
        (replace(MACHINE, packages={**PACKAGES, "triton": None}), "GPU ranks cannot run"),
    ],
)
def test_what_is_missing_is_named_with_a_fix(machine: Machine, said: str):
    missing = [finding for finding in examine(machine) if finding.kind == "missing"]
    assert any(said in finding.text and finding.fix for finding in missing)


def test_memory_in_use_is_worth_a_note():
    assert kinds(replace(MACHINE, gpus=(replace(GPU, used_mib=20000),))) == ["note"]


def test_without_torch_or_gpus_it_says_what_would_compute():
    assert choose({**PACKAGES, "torch": None}, 0) == {"device": "none"}
    assert choose(PACKAGES, 0)["device"] == "cpu"
    assert "one GPU" in choose(PACKAGES, 1)["all-reduce"]


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["packages"]["torch"]
    assert said["findings"]
    assert main(["doctor"]) == 0
    assert "Will be used" in capsys.readouterr().out
