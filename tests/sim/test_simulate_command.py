"""`nitsum simulate` from the command line."""

import json
from pathlib import Path

import msgspec
import pytest

from nitsum.cli import main
from nitsum.cli.simulate_settings import read_switches, weights
from nitsum.cost.adjust import Scale, scaled
from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.fit import fit_table, sample_points
from nitsum.cost.machines import Machine
from nitsum.cost.rates import LinearRate
from nitsum.cost.shapes import shape_named
from nitsum.cost.table import Provenance, load_table, save_table
from nitsum.errors import ConfigError
from nitsum.metrics.eventfile import read_events

BASE = ["simulate", "--model", "Qwen2.5-0.5B", "--machine", "2xA100-80GB", "--duration", "20"]
FEW = ["--rate", "2", "--small-samples", "--max-batch-tokens", "512"]


def test_one_run_prints_a_table_and_writes_its_events(tmp_path, capsys):
    events, page = tmp_path / "e.jsonl", tmp_path / "r.html"
    words = [
        "--plans",
        "TP2,2xTP1",
        "--switch-at",
        "5:2xTP1,10:TP2",
        "--tiers",
        "priority=1,flex=1",
    ]
    files = ["--events", str(events), "--html", str(page)]
    assert main([*BASE, *FEW, *words, *files]) == 0
    text = capsys.readouterr().out
    assert "priority" in text
    assert "TP2 -> 2xTP1" in text
    assert "x real time" in text
    kinds = [type(event).__name__ for event in read_events(events)]
    assert kinds.count("SwitchEnded") == 2
    assert kinds.count("Arrived") == kinds.count("Finished") + kinds.count("Refused") > 10
    assert "<svg" in page.read_text()


def test_the_simulated_twin_of_a_run_is_compared_with_it(tmp_path, capsys):
    events = tmp_path / "e.jsonl"
    targets = str(tmp_path / "t.json")
    same = [*BASE, *FEW, "--plan", "TP2", "--no-prefix-cache"]
    assert main([*same, "--events", str(events), "--save-targets", targets]) == 0
    capsys.readouterr()
    twin = [*same, "--targets", targets, "--compare", str(events)]
    assert main(twin) == 0
    text = capsys.readouterr().out
    assert "TP2 decode" in text
    assert "goodput" in text
    assert main([*twin, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["sim_error_ttft_p50"] == pytest.approx(0.0, abs=1e-6)
    assert figures["served_tpot_p50_s"] > 0.0


def test_canaries_load_the_twin_but_do_not_count(tmp_path, capsys):
    """As in the report of the served run."""
    events = tmp_path / "e.jsonl"
    same = [*BASE, *FEW, "--plan", "TP2", "--no-prefix-cache"]
    assert main([*same, "--events", str(events)]) == 0
    lines = events.read_text().splitlines()
    arrivals = [i for i, line in enumerate(lines) if '"Arrived"' in line]
    for i in arrivals[:3]:
        event = json.loads(lines[i])
        lines[i] = json.dumps({**event, "tenant": "canary"})
    events.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main([*same, "--compare", str(events)]) == 0
    text = capsys.readouterr().out
    assert f"{len(arrivals) - 3} requests in" in text
    assert "3 canaries (" in text


def test_the_demo_s_shape_has_its_name_here_too():
    assert shape_named("demo") == shape_named("SmolLM2-135M")


def test_a_sweep_ends_in_ratios(tmp_path, capsys):
    page = tmp_path / "sweep.html"
    words = ["--plan", "TP2", "--against", "2xTP1:fcfs", "--sweep", "1,2", "--json"]
    assert main([*BASE, *FEW, *words, "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "goodput_ratio_at_2_fcfs" in found["figures"]
    assert {"date", "command", "versions", "hardware", "notes"} <= set(found)
    assert page.read_text().count("<polyline") >= 2


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--sweep", "1,2", "--events", "x"], "single run"),
        (["--sweep", "1,2", "--compare", "x"], "single run"),
        (["--compare", "missing.jsonl"], "Cannot open events"),
        (["--save-cost", "x.json"], "--save-cost goes with --compare"),
        (["--against", "TP2"], "PLAN:POLICY"),
        (["--switch-at", "soon"], "SECONDS:PLAN"),
        (["--trace", "missing.csv"], "synthetic:LENGTHS"),
        (["--rate", "-1"], "above 0"),
    ],
)
def test_mistakes_end_in_advice(words, advice, capsys):
    assert main([*BASE, *words]) == 2
    assert advice in capsys.readouterr().err


def test_a_model_is_asked_for(capsys):
    assert main(["simulate"]) == 2
    assert "Llama-3.1-70B" in capsys.readouterr().err


def test_weights_and_switches(tmp_path):
    file = tmp_path / "tiers.yaml"
    file.write_text("priority: 1\nbatch: 2.5\n")
    assert weights(str(file)) == (("priority", 1.0), ("batch", 2.5))
    assert weights("default=3") == (("default", 3.0),)
    with pytest.raises(ValueError, match="weights"):
        weights({})
    assert [tuple(switch) for switch in read_switches("60:TP8, 120:4xTP2")] == [
        (60.0, "TP8"),
        (120.0, "4xTP2"),
    ]
    with pytest.raises(ConfigError, match="TP8"):
        read_switches("TP8")


def test_a_comparison_writes_the_table_that_the_served_steps_ask_for(tmp_path, capsys):
    table, better, events = (str(tmp_path / name) for name in ("c.json", "b.json", "e.jsonl"))
    cost = AnalyticCost(shape_named("Qwen2.5-0.5B"), Machine.parse("2xA100-80GB"))
    points = sample_points(cost, (1, 2), num_decodes=(0, 1, 8, 64), chunks=(0, 64, 512))
    nothing = Provenance(kind="measured", hardware="", versions={}, date="", command="")
    rate = LinearRate(0.0, 1e9)
    measured = fit_table(points, model="m", provenance=nothing, move=rate, offload=rate)
    save_table(measured, Path(table))
    same = [*BASE, *FEW, "--plan", "TP2"]
    assert main([*same, "--cost", table, "--events", events]) == 0
    twin = [*same, "--compare", events]
    assert main([*twin, "--save-cost", better]) == 2
    assert "give it with --cost" in capsys.readouterr().err
    slow = msgspec.structs.replace(
        measured, degrees=[scaled(entry, Scale(0.5, 2.0)) for entry in measured.degrees]
    )
    save_table(slow, Path(table))
    assert main([*twin, "--cost", table, "--save-cost", better]) == 0
    words, _, prompts = capsys.readouterr().err.rstrip(".\n").rpartition("x")
    assert "TP2 decodes x2.000" in words
    assert float(prompts) == pytest.approx(0.5, rel=0.01)
    assert "Scaled to" in load_table(Path(better)).provenance.notes
