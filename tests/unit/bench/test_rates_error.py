"""Errors of the constants that come with Nitsum, as they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rates_error import STEPS, errors_of, figures, main
from nitsum.cost.rates import load_rates

DATA = Path(__file__).parents[1] / "cost" / "data"
GEMMS, ALL_REDUCE = DATA / "h100_gemms.csv", DATA / "h100_all_reduce.csv"


def test_errors_are_of_the_constants_that_come_with_nitsum(tmp_path: Path):
    argv = ["--model", "Llama-3.1-8B", "--machine", "2xH100-80GB", "--out", str(tmp_path)]
    main([*argv, "--ops", str(GEMMS), "--all-reduce", str(ALL_REDUCE)])
    result = json.loads((tmp_path / "summary.json").read_text())
    found = result["figures"]
    assert found.items() >= dict(figures(errors_of(load_rates("H100-80GB"), [GEMMS], []))).items()
    assert 0.0 < found["tp2_layer_error_p50_share"] < 0.1
    assert found["2_ranks_over_1_mib_num_points"] > 0
    assert str(DATA) not in result["command"]


def test_errors_grow_with_wrong_constants(tmp_path: Path):
    right = dict(figures(errors_of(load_rates("H100-80GB"), [GEMMS], [])))
    wrong = dict(figures(errors_of(load_rates("A100-80GB"), [GEMMS], [])))
    assert wrong["tp2_layer_error_p50_share"] > 5 * right["tp2_layer_error_p50_share"]


def test_terms_are_all_of_a_step(capsys: pytest.CaptureFixture[str]):
    main(["--all-reduce", str(ALL_REDUCE), "--model", "Llama-3.1-8B", "--machine", "2xH100-80GB"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for step in STEPS:
        parts = [float(v) for name, v in printed.items() if name.startswith(f"{step}_")]
        assert len(parts) == 6
        assert sum(parts) == pytest.approx(1.0, abs=0.01)
