"""Switching changes no result, on checkpoints where nothing divides; and each fault is found.

A worker set starts in seconds but holds one checkpoint and one fault, so every case needs its own;
the requests are few. `nitsum verify` on a larger model and with more switches is the same code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nitsum.bench.parity import TOLERANCES, Report
from nitsum.bench.scenario import Scenario, engine_config
from nitsum.bench.verify import verify
from nitsum.messages import Fault
from nitsum.plan import PlanSet, default_plans, read_plans
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.processes

CHECKPOINTS = {
    "llama": {},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 1},
}
"""3 KV heads of 2 query heads; 2, the same number as ranks or half of it; 1, for all ranks."""

FAULTS: tuple[Fault, ...] = ("swap-heads", "stale-block", "lost-tail", "wrong-vocab")


@pytest.fixture(scope="module", autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in CHECKPOINTS}
    for name, fields in CHECKPOINTS.items():
        write_checkpoint(folders[name], name, **fields)
    return folders


ROLE_PLANS = {
    2: ("TP1-prefill+TP1-decode", "TP2", "2xTP1"),
    4: ("TP2-prefill+2xTP1-decode", "TP4", "4xTP1"),
}


def run(
    model: Path,
    num_ranks: int,
    fault: Fault | None = None,
    num_switches: int = 8,
    plans: PlanSet | None = None,
) -> Report:
    plans = plans or default_plans(num_ranks)
    scenario = Scenario(num_switches=num_switches, num_requests=16, seed=num_ranks)
    config = engine_config(model, plans, scenario, fault=fault)
    return verify(config, plans, scenario, lambda *_: None, lambda _: None)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_handing_over_changes_no_result(folders: dict[str, Path], num_ranks: int):
    report = run(folders["llama"], num_ranks, plans=read_plans([*ROLE_PLANS[num_ranks]], num_ranks))
    assert report.verdict != "fail", (report.errors, report.against)
    assert report.num_handed_over >= 4
    # Whether a switch meets a paused request is chance here, and has a test of its own below.
    assert set(report.unproven) <= {"no request was moved while it was paused"}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_switching_changes_no_result(folders: dict[str, Path], name: str, num_ranks: int):
    report = run(folders[name], num_ranks)
    assert report.verdict == "pass", (report.errors, report.unproven, report.against)
    assert report.num_switches >= 8
    assert report.highest_use > 0.9
    assert all(report.moved[state] for state in ("prefill", "decode", "paused"))
    assert report.num_prefix_hits > 0


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_planted_fault_is_found(folders: dict[str, Path], name: str, fault: Fault):
    report = run(folders[name], 2, fault, num_switches=6)
    assert report.verdict == "fail"
    assert all(difference.logits > 0.1 for difference in report.against.values())
    # By the mean alone, too. How far it is off depends on which blocks a switch happened to move.
    tolerance = TOLERANCES["float32"].nll
    assert all(difference.nll_difference > tolerance for difference in report.against.values())
