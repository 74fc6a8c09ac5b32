"""The goodput table: which points are served, how they are served, what comes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from benchmarks.goodput import serve, table
from benchmarks.goodput.__main__ import HERE
from benchmarks.goodput.basis import basis_of, source_digest
from benchmarks.goodput.foresee import SHARES, Foresight, foresee, goodput
from benchmarks.goodput.points import (
    CLIENT_S,
    SATURATED,
    START_S,
    Mixes,
    Point,
    Points,
    Run,
    Side,
    device_s,
    groups,
    load_points,
    only_priority,
    save,
)
from benchmarks.gpu_probe import SHAPE
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import shape_named
from nitsum.cost.shipped import shipped_cost
from nitsum.errors import ConfigError
from nitsum.limits import STEP_LIMITS
from nitsum.metrics.targets import Targets, TierRule, load_targets, save_targets
from nitsum.shape import ModelShape
from nitsum.sim.run import Options
from nitsum.sim.system import Site, site_targets
from nitsum.workload.generate import generate
from nitsum.workload.spec import MixSpec, read_mix, scaled
from tests.shapes import TINY_LLAMA

OURS = Side(plans=["TP2", "2xTP1"], policy="nitsum", adaptive=True)
STATIC = Side(plans=["2xTP1"], policy="fcfs")


TINY = ModelShape.from_hf(TINY_LLAMA)


def few_targets() -> Targets:
    rules = {name: TierRule(k=100.0, tpot_s=1.0) for name in ("priority", "default")}
    rules |= {name: TierRule(deadline_s=60.0) for name in ("flex", "batch")}
    return Targets(source="test", prefill=[(1, 0.01), (1000, 1.0)], tiers=rules)


def site(name: str = "tiny", shape: ModelShape = TINY, machine: str = "2xCPU") -> Site:
    return Site(model=name, shape=shape, machine=Machine.parse(machine))


def mix(duration_s: float = 2.0, scale: float = 1.0) -> MixSpec:
    streams = [
        {"name": name, "rate_per_s": 4, "lengths": "azure_code", "tiers": {tier: 1}}
        for name, tier in (("chat", "priority"), ("code", "default"))
    ]
    for stream in streams:
        stream["length_scale"] = scale
    return read_mix({"name": "m", "duration_s": duration_s, "seed": 3, "streams": streams})


def point(
    name: str, side: Side = STATIC, load: float = 2.0, of: Mixes = "mixed", **simulated: float
):
    return Point(name=name, side=side, mix=of, load=load, simulated=simulated)


def points_file(points: list[Point], mixed: MixSpec | None = None) -> Points:
    mixed = mixed or mix()
    return Points(
        date="2026-11-25",
        command="plan",
        machine="2xCPU",
        device="cpu",
        num_ranks=2,
        basis=basis_of(site(), few_targets()),
        mixes={"mixed": mixed, "shifting": mixed, "alone": only_priority(mixed)},
        warmup_s=0.5,
        drain_s=3.0,
        saturation_per_s=10.0,
        alone_capacity=40.0,
        points=points,
        runs=[],
    )


# --- points --------------------------------------------------------------------------------------


def test_a_file_says_what_it_said(tmp_path: Path):
    file = points_file([point("a"), point("b", OURS)])
    save(file, tmp_path / "points.json")
    assert load_points(tmp_path / "points.json") == file


@pytest.mark.parametrize("content", ["{}", "nonsense"])
def test_a_bad_file_is_said(tmp_path: Path, content: str):
    (tmp_path / "points.json").write_text(content)
    with pytest.raises(ConfigError, match=r"Points .*points\.json"):
        load_points(tmp_path / "points.json")


def test_points_are_chosen_by_name_and_share_servers():
    file = points_file([point("a"), point("b", OURS), point("c")])
    assert [each.name for each in file.chosen(["c", "a"])] == ["a", "c"]
    assert [[each.name for each in group] for group in groups(file.points)] == [["a", "c"], ["b"]]
    assert device_s(file, file.points) == 2 * START_S + 3 * (2.0 + 3.0 + CLIENT_S)
    with pytest.raises(ConfigError, match=r"No point d\. There are: a, b, c"):
        file.chosen(["d"])


def test_priority_alone_arrives_when_it_did():
    both, alone = mix(20.0), only_priority(mix(20.0))
    urgent = [item for item in generate(both) if item.tier == "priority"]
    assert list(generate(alone)) == urgent
    assert urgent
    with pytest.raises(ConfigError, match="no stream of priority"):
        only_priority(msgspec.structs.replace(both, streams=both.streams[1:]))


def test_a_static_side_keeps_its_own_shard():
    assert "--min-tp 2" in " ".join(
        Side(plans=["TP2"], policy="priority").flags(2, STEP_LIMITS["cpu"])
    )
    words = " ".join(OURS.flags(2, STEP_LIMITS["cpu"]))
    assert "--plans TP2,2xTP1 --min-tp 1 --policy nitsum --controller adaptive" in words


def test_a_server_has_the_sizes_that_were_simulated():
    words = " ".join(OURS.flags(2, STEP_LIMITS["cuda"]))
    assert "--block-tokens 32 --max-num-seqs 256 --max-batch-tokens 2048" in words
    assert "--max-mixed-tokens 1024" in words


def test_points_are_served_as_they_were_planned():
    """Not with another model, other step times or other targets."""
    shape, targets = shape_named("Llama-3.1-8B"), few_targets()
    here = site("some/folder/Llama-3.1-8B", shape, "2xH100-80GB")
    steps = shipped_cost(shape, here.machine, "bfloat16")
    assert steps is not None
    measured = basis_of(replace(here, cost=steps), targets)
    assert measured.model == "Llama-3.1-8B"
    measured.check(ModelShape.from_hf(SHAPE), steps, targets)
    with pytest.raises(ConfigError, match=r"planned for Llama-3\.1-8B, and this is another"):
        measured.check(TINY, steps, targets)
    with pytest.raises(ConfigError, match="and this is the analytic model"):
        measured.check(shape, None, targets)
    analytic = basis_of(here, targets)
    analytic.check(shape, None, targets)
    with pytest.raises(ConfigError, match="planned with the analytic model, and this is the table"):
        analytic.check(shape, steps, targets)
    with pytest.raises(ConfigError, match="other targets"):
        measured.check(shape, steps, targets.with_k(2.0))


def test_the_committed_points_fit_what_is_served_by_default():
    file = load_points(HERE / "points.json")
    shape, machine = ModelShape.from_hf(SHAPE), Machine.parse(file.machine)
    steps = shipped_cost(shape, machine, "bfloat16")
    file.basis.check(shape, steps, load_targets(HERE / "targets.json"))


@pytest.mark.parametrize("other", ["load", "drain_s", "basis"])
def test_a_result_of_another_plan_is_not_taken(tmp_path: Path, other: str):
    """It may have the same name."""
    file = points_file([point("a")])
    result = {"figures": {}, "point_sha256": file.digest(file.points[0])}
    (tmp_path / "a.json").write_text(json.dumps(result))
    assert table.read(file, [tmp_path]) == {"a": result}
    plans = {
        "load": points_file([point("a", load=3.0)]),
        "drain_s": msgspec.structs.replace(file, drain_s=4.0),
        "basis": msgspec.structs.replace(
            file, basis=basis_of(replace(site(), block_tokens=32), few_targets())
        ),
    }
    with pytest.raises(ConfigError, match=r"a\.json was not served for the point a"):
        table.read(plans[other], [tmp_path])
    save_targets(few_targets(), tmp_path / "targets.json")
    save_shape(tmp_path / "model")
    job = serve.Job(
        file=plans[other],
        targets=tmp_path / "targets.json",
        out=tmp_path,
        model=str(tmp_path / "model"),
        command="run",
    )
    with pytest.raises(ConfigError, match=r"a\.json was not served for the point a"):
        serve.run(job, job.file.points)


def save_shape(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))


# --- foresight -----------------------------------------------------------------------------------


@dataclass
class Invented:
    """Knows what every side reaches without a run."""

    reaches: Callable[[Side, float], float]
    note: Callable[[str], None] = field(default=lambda _line: None)
    most_per_s: float = 20.0
    """Answers of narrow lanes; wide ones give three quarters."""

    def run(self, side: Side, mix: Mixes, load: float) -> Run:
        answered = min(load, self.most_per_s * (1.0 if side.plans[0] == "2xTP1" else 0.75))
        figures = {
            "goodput_requests_per_s": self.reaches(side, load),
            "answered_per_s": answered,
            "priority_attainment_share": 1.0 if load <= 50.0 else 0.9,
            "busy_share": 1.0,
            "num_switches": 0.0,
        }
        return Run(side=side.name, mix=mix, load=load, figures=figures)


def reaches(side: Side, load: float) -> float:
    """Narrow lanes serve a tenth more; the better it is decided, the later it falls."""
    most = {"fcfs": 10.0, "priority": 12.0, "nitsum": 18.0}[side.policy]
    factor = 1.0 if side.plans[0] == "TP2" else 1.1
    return factor * (load if load <= most else max(1.0, 2 * most - load))


def test_each_side_is_served_at_its_own_best_load_and_above_saturation():
    found = foresee(Invented(reaches), ["TP2", "2xTP1"], OURS)
    points = {each.name: each for each in found.points}
    assert (found.saturation_per_s, found.alone_capacity) == (20.0, 50.0)
    assert {p.load for name, p in points.items() if name.endswith("_saturated")} == {30.0}
    assert points["static_fcfs_best"].side == STATIC
    assert points["static_fcfs_best"].load == pytest.approx(0.5 * 20.0)
    assert points["static_nitsum_best"].load == pytest.approx(0.9 * 20.0)
    assert points["ours_shifting"].load == points["static_nitsum_shifting"].load
    assert points["alone_best"].load == points["ours_best"].load
    assert points["alone_best"].mix == "alone"
    assert points["alone_best"].side.plans == ["TP2"]
    best = max(goodput(run) for run in found.runs if run.side == STATIC.name)
    assert points["static_fcfs_best"].simulated["goodput_requests_per_s"] == best
    assert found.points[0].name == "ours_saturated"
    mine = [run.load for run in found.runs if run.side == "ours" and run.mix == "mixed"]
    assert sorted(mine) == pytest.approx([share * 20.0 for share in (*SHARES, SATURATED)])


def test_a_run_is_made_once(tmp_path: Path):
    here = site("Llama-3.1-8B", shape_named("Llama-3.1-8B"), "2xH100-80GB")
    lines: list[str] = []
    foresight = Foresight(
        site=here,
        targets=site_targets(here),
        mixes={"mixed": mix()},
        options=Options(drain_s=5.0),
        warmup_s=0.5,
        folder=tmp_path,
        code="this",
        note=lines.append,
    )
    first = foresight.run(OURS, "mixed", 2.0)
    assert goodput(first) > 0
    assert foresight.run(OURS, "mixed", 2.0) == first
    assert len(lines) == 1
    foresight.run(STATIC, "mixed", 2.0)
    assert len(lines) == 2
    arrivals = [item.at_s for item in generate(scaled(mix(), 2.0))]
    judged = [at_s for at_s in arrivals if at_s >= arrivals[0] + 0.5]
    assert first.figures["num_requests"] == len(judged)
    replace(foresight, code="another").run(OURS, "mixed", 2.0)
    assert len(lines) == 3
    steps = shipped_cost(here.shape, here.machine, "bfloat16")
    replace(foresight, site=replace(here, cost=steps)).run(OURS, "mixed", 2.0)
    assert len(lines) == 4


def foresight_of(mixed: MixSpec, folder: Path, warmup_s: float) -> Foresight:
    here = site("Llama-3.1-8B", shape_named("Llama-3.1-8B"), "2xH100-80GB")
    return Foresight(
        site=here,
        targets=site_targets(here),
        mixes={"mixed": mixed},
        options=Options(drain_s=5.0),
        warmup_s=warmup_s,
        folder=folder,
        code="this",
        note=lambda line: None,
    )


@pytest.mark.parametrize(("seconds", "warmup_s"), [(0.01, 0.0), (2.0, 1.99)])
def test_a_run_too_short_to_be_judged_is_said(tmp_path: Path, seconds: float, warmup_s: float):
    with pytest.raises(ConfigError, match="--seconds"):
        foresee(foresight_of(mix(seconds), tmp_path, warmup_s), ["TP2", "2xTP1"], OURS)
    assert not list(tmp_path.iterdir()), "what was not judged is not kept"


def test_nobody_answered_is_no_saturation():
    with pytest.raises(ConfigError, match="--seconds"):
        foresee(Invented(reaches, most_per_s=0.0), ["TP2", "2xTP1"], OURS)


def test_code_is_told_apart(tmp_path: Path):
    (tmp_path / "a.py").write_text("one = 1\n")
    (tmp_path / "a.pyc").write_bytes(b"1")
    first = source_digest(tmp_path.rglob("*"))
    (tmp_path / "a.pyc").write_bytes(b"2")
    assert source_digest(tmp_path.rglob("*")) == first
    (tmp_path / "a.py").write_text("one = 2\n")
    assert source_digest(tmp_path.rglob("*")) != first


# --- the table -----------------------------------------------------------------------------------


FILE = points_file([point("ours_best", OURS, 20.0), point("ours_saturated", OURS, 30.0)])
"""Priority alone at 40 a second: only the first is below 70% of it."""


@dataclass
class Results:
    """Figures by point."""

    of: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def add(self, name: str, goodput: float, **others: float) -> Results:
        self.of[name] = {"goodput_requests_per_s": goodput, **others}
        return self


def test_the_smaller_ratio_counts():
    found = Results()
    found.add("ours_best", 12.0).add("static_fcfs_best", 10.0)
    found.add("ours_saturated", 9.0).add("static_fcfs_saturated", 1.0)
    ratios = table.ratios_of(FILE, found.of)
    assert ratios["goodput_ratio_best_static_fcfs_peak"] == pytest.approx(1.2)
    assert ratios["goodput_ratio_best_static_fcfs_saturated"] == pytest.approx(9.0)
    assert ratios["goodput_ratio_best_static_fcfs"] == pytest.approx(1.2)


def test_stricter_targets_have_ratios_of_their_own():
    at = {"ours": (7.0, 15.0), "static_fcfs": (14.0, 10.0)}
    found = Results()
    for side, (half, double) in at.items():
        more = {"goodput_at_0.5k_requests_per_s": half, "goodput_at_2k_requests_per_s": double}
        found.add(f"{side}_best", 10.0, **more)
    ratios = table.ratios_of(FILE, found.of)
    assert ratios["goodput_ratio_best_static_fcfs_peak"] == pytest.approx(1.0)
    assert ratios["goodput_ratio_best_static_fcfs_peak_half_targets"] == pytest.approx(0.5)
    assert ratios["goodput_ratio_best_static_fcfs_peak_double_targets"] == pytest.approx(1.5)


def test_what_ranks_did_is_a_share_of_what_the_device_promises(tmp_path: Path):
    file = points_file([point("a")])
    gpu = Machine.parse(file.machine).gpu
    figures = {
        "flex_attainment_share": 0.25,
        "rank1_read_bytes_per_s": 0.5 * gpu.memory_bytes_per_s,
        "rank1_flops_per_s": 0.1 * gpu.matmul_flops_per_s,
    }
    result = {"figures": figures, "date": "d", "command": "c", "hardware": "h", "versions": {}}
    table.show(file, {"a": result}, tmp_path / "summary.json", "table")
    published = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert published["a_flex_attainment_share"] == 0.25
    assert published["a_rank1_read_bytes_share_of_peak"] == pytest.approx(0.5)
    assert published["a_rank1_flops_share_of_peak"] == pytest.approx(0.1)


def test_half_of_a_pair_is_no_ratio():
    ratios = table.ratios_of(
        FILE, Results().add("ours_best", 12.0).add("static_fcfs_saturated", 1.0).of
    )
    assert not ratios
    one = Results().add("ours_best", 12.0).add("static_fcfs_best", 10.0)
    assert list(table.ratios_of(FILE, one.of)) == ["goodput_ratio_best_static_fcfs_peak"]


def test_priority_is_compared_where_it_is_worse():
    found = Results()
    for load, ours, share in (("best", 0.2, 0.98), ("saturated", 0.3, 0.7)):
        found.add(f"ours_{load}", 1.0, priority_ttft_p99_s=ours, priority_attainment_share=share)
        found.add(f"alone_{load}", 1.0, priority_ttft_p99_s=0.2)
    ratios = table.ratios_of(FILE, found.of)
    assert ratios["priority_p99_ttft_ratio_best"] == pytest.approx(1.0)
    assert ratios["priority_p99_ttft_ratio"] == pytest.approx(1.5)
    assert ratios["priority_attainment_saturated"] == 0.7
    assert ratios["priority_attainment"] == 0.98
    assert "priority_p99_tpot_ratio" not in ratios


def test_ranks_are_as_busy_as_above_saturation():
    found = Results().add("ours_saturated", 1.0, busy_share=0.9)
    found.add("ours_best", 1.0, busy_share=0.5).add("static_fcfs_saturated", 1.0, busy_share=0.8)
    ratios = table.ratios_of(FILE, found.of)
    assert (ratios["gpu_busy_share"], ratios["gpu_busy_share_static"]) == (0.9, 0.8)


def test_every_machine_is_named(tmp_path: Path):
    """Points may be served in several goes."""
    file = points_file([point(name) for name in "abc"])
    machines = {"a": ("H100 here", "2.1"), "b": ("H100 there", "2.1"), "c": ("H100 here", "2.2")}
    results = {
        name: {
            "figures": {"goodput_requests_per_s": 1.0},
            "date": "2026-11-25",
            "command": "run",
            "hardware": hardware,
            "versions": {"nitsum": "0.1", "torch": torch},
        }
        for name, (hardware, torch) in machines.items()
    }
    table.show(file, results, tmp_path / "summary.json", "table")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["hardware"] == "H100 here | H100 there"
    assert summary["versions"] == {"nitsum": "0.1", "torch": "2.1 | 2.2"}


# --- served --------------------------------------------------------------------------------------


def test_points_are_served_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two sides on CPU ranks, through HTTP; what is there already is not served again."""
    model = tmp_path / "model"
    save_shape(model)
    save_targets(few_targets(), tmp_path / "targets.json")
    sides = {"ours_best": OURS, "static_fcfs_best": STATIC}
    served = [point(n, s, load=1.0, goodput_requests_per_s=7.5) for n, s in sides.items()]
    file = points_file(served, mix(scale=0.02))
    job = serve.Job(
        file=file,
        targets=tmp_path / "targets.json",
        out=tmp_path / "out",
        model=str(model),
        command="run",
        flags=["--load-format", "dummy", "--kv-memory", "1MiB"],
    )
    serve.run(job, served)
    results = table.read(file, [tmp_path / "out"])
    assert sides.keys() <= results.keys()
    for name in sides:
        figures = results[name]["figures"]
        assert figures["goodput_requests_per_s"] > 1.0
        assert 0.0 < figures["busy_share"] <= figures["step_share"] <= 1.0
        assert figures["rank0_flops_per_s"] > 0.0
    capsys.readouterr()
    serve.run(job, served)
    assert "0 of 2 points to serve" in capsys.readouterr().out

    table.show(file, results, tmp_path / "summary.json", "table")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["command"] == "plan; run; table"
    assert summary["figures"]["goodput_ratio_best_static_fcfs_peak"] == pytest.approx(1.0, abs=0.2)
    assert "goodput_ratio_best_static_fcfs" not in summary["figures"]
    assert summary["figures"]["ours_best_rank0_flops_per_s"] > 0.0
