"""`nitsum plan` and `nitsum explain`, from flags to files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nitsum.cli import main
from nitsum.events import PlanDecided, PlanScored, TierObserved
from nitsum.metrics.eventfile import write_events
from nitsum.plan import read_plans

MIX = """
name: small
duration_s: 120
streams:
  - {name: urgent, rate_per_s: 4, lengths: azure_conversation, tiers: {priority: 1}}
  - {name: bulk, rate_per_s: 8, lengths: azure_code, tiers: {default: 1}}
phases:
  - {name: first, at_s: 0, rates: {bulk: 0.1}}
  - {name: second, at_s: 60, rates: {urgent: 0.1}}
"""


@pytest.fixture
def mix(tmp_path: Path) -> str:
    path = tmp_path / "mix.yaml"
    path.write_text(MIX)
    return str(path)


def test_a_plan_file_is_read_back(mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plans.yaml"
    words = ["plan", "Llama-3.1-8B", "--machine", "4xA100-80GB", "--workload", mix]
    assert main([*words, "--num-plans", "2", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "static layouts" in shown
    assert "queueing estimate" in shown
    plans = read_plans(yaml.safe_load(out.read_text()), 4)
    assert 1 <= len(plans.plans) <= 2
    assert all(f"* {plan.name}" in shown for plan in plans.plans)
    assert main(["plans", "--ranks", "4", "--plans", str(out)]) == 0


def test_a_model_that_needs_all_gpus_gets_one_plan(
    mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["plan", "Llama-3.1-405B", "--machine", "8xH200-141GB", "--workload", mix]
    assert main([*words, "--rate", "0.05"]) == 0
    assert "each rank holds 1/8 of the weights" in capsys.readouterr().out


def test_a_model_that_does_not_fit(mix: str, capsys: pytest.CaptureFixture[str]):
    words = ["plan", "Llama-3.1-405B", "--machine", "8xA100-80GB", "--workload", mix]
    assert main(words) == 2
    assert "does not fit 8xA100-80GB" in capsys.readouterr().err


def decided(number: int, chosen: str) -> PlanDecided:
    return PlanDecided(
        at_s=float(number),
        decision=number,
        plan="TP2",
        chosen=chosen,
        reason=f"{chosen} is what the test wants",
        trigger="window",
        scores=[
            PlanScored(plan=name, value=1.0, feasible_per_s={"default": 1.0})
            for name in ("2xTP1", "TP2")
        ],
        load={
            "default": TierObserved(
                rate_per_s=2.0, prompt_tokens=100.0, output_tokens=10.0, num_waiting=3
            )
        },
        expected_dwell_s=20.0,
    )


def test_explain_tells_changes_and_on_request_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "events.jsonl"
    write_events(path, [decided(1, "TP2"), decided(2, "2xTP1")])
    assert main(["explain", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "#2 at 2.0 s (window): went to 2xTP1: 2xTP1 is what the test wants." in shown
    assert "default 2.00/s of 100+10 tokens, 3 waiting" in shown
    assert "#1" not in shown
    assert shown.endswith("2 decisions, 1 changes of plan.\n")
    main(["explain", str(path), "--all"])
    assert "#1 at 1.0 s (window): stayed in TP2" in capsys.readouterr().out


def test_explain_names_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
