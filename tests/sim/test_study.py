"""Windows of load, served by every layout and by ours, in figures and on a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitsum.errors import ConfigError
from nitsum.sim.study import Bench, Served, WindowResult, explained, figures, load_study
from nitsum.sim.study_page import save_page, table

STUDY = """
model: Llama-3.1-8B
machine: 2xA100-80GB
plans: [2xTP1, TP2]
warmup_s: 2
cell_s: 4
switch_costs_s: [0.1]
windows:
  - shifting: true
    mix:
      name: flip
      duration_s: 12
      streams:
        - {name: chat, rate_per_s: 4, lengths: azure_conversation, tiers: {priority: 1}}
      phases: [{name: a, at_s: 0}, {name: b, at_s: 6, rates: {chat: 2}}]
"""


def served(name: str, *met: int) -> Served:
    return Served(name, [*met], 100, 10.0 * len(met), {}, 0.5, 0, 1.0)


def test_a_study_from_file_to_page(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(STUDY)
    bench = Bench.of(load_study(tmp_path / "study.yaml", tmp_path))
    lines: list[str] = []
    result = bench.run(bench.study.windows[0], lines.append)
    assert [each.system for each in result.statics] == ["2xTP1 nitsum", "TP2 nitsum"]
    assert len(lines) == 5
    assert result.ours.num_requests == result.statics[0].num_requests > 20
    found = figures([result])
    assert found["goodput_vs_best_static_min"] == found["flip_goodput_vs_best_static"]
    assert 0.0 < found["goodput_vs_hindsight_min"] <= 1.0
    assert "goodput_vs_best_static_min_any_switch_cost" in found
    assert "flip" in table([result])
    save_page([result], bench, tmp_path / "index.html")
    assert "<svg" in (tmp_path / "index.html").read_text()
    assert isinstance(explained(result), str)


def test_a_study_names_its_blocks_and_its_bound(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(STUDY + "block_tokens: 32\nmax_mixed_tokens: 1024\n")
    bench = Bench.of(load_study(tmp_path / "study.yaml", tmp_path))
    for system in (bench.ours, *bench.statics):
        assert system.arena.block_tokens == system.config.block_tokens == 32
        assert system.config.max_mixed_tokens == 1024


def test_steps_of_a_study_are_bounded_by_what_it_says_alone(tmp_path: Path):
    """Whatever `serve` has by default on such a machine."""
    (tmp_path / "study.yaml").write_text(STUDY)
    bench = Bench.of(load_study(tmp_path / "study.yaml", tmp_path))
    for system in (bench.ours, *bench.statics):
        config = system.config
        assert (config.max_num_seqs, config.max_batch_tokens) == (256, 2048)
        assert config.mixed_tokens == config.max_batch_tokens


def test_ratios_by_hand():
    result = WindowResult(
        name="w",
        shifting=True,
        statics=[served("wide", 10, 2), served("narrow", 4, 9)],
        ours=served("ours", 9, 8),
        path=served("search", 10, 9),
    )
    assert result.best_static.system == "narrow"
    assert result.layout_bound == pytest.approx(19 / 13)
    assert result.over_static(result.ours) == pytest.approx(17 / 13)
    assert result.over_hindsight == pytest.approx(17 / 19)


def test_hindsight_has_nothing_less_than_any_run():
    """A search may miss what a static layout, or ours, reaches."""
    found = figures([searched(narrow=8, ours=9)])
    assert found["w_search_goodput_requests_per_s"] < found["w_hindsight_goodput_requests_per_s"]
    assert (
        found["w_hindsight_goodput_requests_per_s"]
        == found["w_ours_goodput_requests_per_s"]
        > found["w_narrow_goodput_requests_per_s"]
    )
    assert searched(narrow=12, ours=9).hindsight.system == "narrow"


def searched(narrow: int, ours: int) -> WindowResult:
    return WindowResult(
        name="w",
        shifting=False,
        statics=[served("narrow", narrow)],
        ours=served("ours", ours),
        path=served("search", 7),
    )


def test_a_bad_study_is_named(tmp_path: Path):
    (tmp_path / "study.yaml").write_text("model: x\n")
    with pytest.raises(ConfigError, match=r"Study .*machine"):
        load_study(tmp_path / "study.yaml", tmp_path)
    with pytest.raises(ConfigError, match="Cannot read study"):
        load_study(tmp_path / "none.yaml", tmp_path)
