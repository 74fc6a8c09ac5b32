"""What a sweep concludes from its curves; systems and the memory they leave for KV."""

import msgspec
import pytest

from nitsum.cost.machines import Machine
from nitsum.cost.memory import MemoryModel
from nitsum.cost.shapes import shape_named
from nitsum.errors import ConfigError
from nitsum.metrics.records import Recorder
from nitsum.metrics.report import build_report
from nitsum.metrics.targets import held_to
from nitsum.plan import parse_plan
from nitsum.shape import Geometry
from nitsum.sim.page import render
from nitsum.sim.run import Options
from nitsum.sim.source import read_source
from nitsum.sim.sweep import Point, figures, peak_goodput, sustained_load, sweep
from nitsum.sim.system import (
    Site,
    baselines,
    our_system,
    site_targets,
    split_plans,
    static_system,
)
from tests.sim.kit import small_system

EMPTY = build_report(Recorder())
SEVENTY = Site(
    model="Llama-3.1-70B",
    shape=shape_named("Llama-3.1-70B"),
    machine=Machine.parse("8xA100-80GB"),
)


def point(system: str, load: float, attained: float, goodput: float, chain_p99: float) -> Point:
    tier = {"tier": "priority", "num_requests": 100, "num_met": 0, "attainment": attained}
    blank = {"num": 0}
    rest = ("queue_s", "ttft_s", "tpot_s", "e2e_s", "longest_gap_s")
    counts = ("num_refused", "num_unfinished", "num_downgraded", "num_displaced")
    content = msgspec.to_builtins(EMPTY)
    content["goodput_per_s"] = goodput
    content["tiers"] = [
        {**tier, "goodput_per_s": None, **dict.fromkeys(counts, 0), **dict.fromkeys(rest, blank)}
    ]
    content["chains"]["latency_s"] = {"num": 1000, "p99": chain_p99}
    return Point(
        system=system,
        load=load,
        report=msgspec.convert(content, type(EMPTY)),
        busy_share=0.5,
        arena_mean_share=0.5,
        arena_max_share=0.9,
        speedup=50.0,
    )


POINTS = [
    point("a", 1.0, 1.0, 1.0, 10.0),
    point("a", 2.0, 0.95, 2.0, 20.0),
    point("a", 4.0, 0.85, 3.0, 30.0),
    point("b", 1.0, 1.0, 1.0, 15.0),
    point("b", 2.0, 0.5, 1.5, 40.0),
    point("b", 4.0, 0.1, 0.5, 90.0),
]


def test_the_sustained_load_lies_where_the_curve_crosses():
    assert sustained_load(POINTS, "a", "priority") == pytest.approx(3.0)
    assert sustained_load(POINTS, "b", "priority") == pytest.approx(1.2)
    assert sustained_load(POINTS, "a", "priority", share=0.8) == 4.0  # never lost
    assert sustained_load(POINTS, "a", "flex") is None
    assert sustained_load([point("c", 1.0, 0.2, 1.0, 1.0)], "c", "priority") is None


def test_ratios_are_ours_over_theirs_and_latencies_the_other_way_round():
    found = figures(POINTS, "a", ["b"])
    assert peak_goodput(POINTS, "a") == 3.0
    assert found["priority_attainment_load_ratio_b"] == pytest.approx(3.0 / 1.2)
    assert found["priority_attainment_load_ratio"] == pytest.approx(3.0 / 1.2)
    assert found["b_priority_load_at_99pct"] == pytest.approx(1.02)
    assert found["goodput_ratio_b"] == pytest.approx(2.0)
    assert found["goodput_ratio_at_4_b"] == pytest.approx(6.0)
    assert found["chain_p99_ratio_at_2_b"] == pytest.approx(2.0)
    assert found["chain_p99_ratio"] == pytest.approx(1.5)


def test_a_page_shows_every_system():
    page = render(POINTS, "a <title>")
    assert "a &lt;title&gt;" in page
    assert page.count("<polyline") == 4  # two systems: goodput, priority


def test_all_systems_of_a_sweep_see_the_same_arrivals():
    systems = [small_system("TP2", policy="fcfs"), small_system("2xTP1", policy="priority")]
    mix = read_source("synthetic:azure_code", rate_per_s=1.0, duration_s=8.0)
    targets = site_targets(SEVENTY)
    lines: list[str] = []
    points = sweep(systems, mix, (1.0, 3.0), targets, options=Options(), note=lines.append)
    assert [p.load for p in points] == [1.0, 1.0, 3.0, 3.0]
    counts = [p.report.num_requests for p in points]
    assert counts[0] == counts[1] < counts[2] == counts[3]
    assert len(lines) == 4


def test_a_static_layout_keeps_its_own_shard_and_gets_the_rest_as_kv():
    static = static_system(SEVENTY, parse_plan("TP8", 8), "fcfs")
    ours = our_system(SEVENTY, ("TP8", "2xTP4"))
    assert (static.config.min_tp, ours.config.min_tp) == (8, 4)
    alone = MemoryModel(Geometry(SEVENTY.shape, 8, 8), SEVENTY.machine).arena_bytes
    charged = MemoryModel(Geometry(SEVENTY.shape, 8, 4), SEVENTY.machine).arena_bytes
    for system, arena_bytes in ((static, alone), (ours, charged)):
        arena = system.arena
        assert 0 <= arena_bytes - arena.num_units * arena.unit_bytes < arena.unit_bytes
    assert charged < 0.75 * alone


def test_a_layout_without_room_is_refused_with_advice():
    with pytest.raises(ConfigError, match="wider lanes"):
        static_system(SEVENTY, parse_plan("8xTP1", 8), "fcfs")


def test_the_baselines_are_every_layout_and_policy():
    names = [system.name for system in baselines(SEVENTY)]
    assert len(names) == len(set(names))
    assert {"TP8 fcfs", "2xTP4 priority", "4xTP2 nitsum", "split TP4|2xTP2 nitsum"} <= set(names)
    assert any(name.startswith("threshold TP8/") for name in names)


def test_a_split_gives_each_half_of_the_ranks_to_its_tiers():
    plan = next(p for p in split_plans(8, [2, 4, 8]) if p.name == "split TP4|2xTP2")
    owners = {rank: lane.tiers for lane in plan.lanes for rank in lane.ranks}
    assert [lane.degree for lane in plan.lanes] == [4, 2, 2]
    assert [owners[rank][0] for rank in range(8)] == ["priority"] * 4 + ["flex"] * 4


def test_tiers_promise_what_the_run_is_judged_by():
    targets = site_targets(SEVENTY)
    tiers = {tier.name: tier for tier in held_to(SEVENTY.tiers, targets)}
    assert tiers["priority"].tpot_s == targets.tiers["priority"].tpot_s
    assert tiers["batch"].deadline_s == 1800.0
    assert "TP4" in targets.source
