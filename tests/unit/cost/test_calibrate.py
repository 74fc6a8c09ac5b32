"""Fitting rates to measured kernels."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.cost.calibrate import fit_gemm, fit_linear, gemm_errors, layer_errors, main
from nitsum.cost.curve import Curve, fit_curve, interpolate, isotonic, lower_envelope
from nitsum.cost.profiles import GemmPoint, read_all_reduces, read_gemms
from nitsum.cost.rates import GemmRate, LinearRate, Rates, all_reduce_curve, load_rates
from nitsum.cost.simplex import minimise
from nitsum.errors import ConfigError

DATA = Path(__file__).parent / "data"
GEMMS, ALL_REDUCE = DATA / "h100_gemms.csv", DATA / "h100_all_reduce.csv"

finite = st.floats(-1e3, 1e3)


@given(st.lists(finite, min_size=1, max_size=30))
def test_isotonic_is_monotone_keeps_the_mean_and_changes_nothing_twice(
    values: list[float],
) -> None:
    result = isotonic(values)
    assert result == sorted(result)
    assert sum(result) == pytest.approx(sum(values), abs=1e-6)
    assert isotonic(result) == pytest.approx(result)


def test_isotonic_weighs() -> None:
    assert isotonic([3.0, 1.0], [3.0, 1.0]) == pytest.approx([2.5, 2.5])


@given(st.lists(st.tuples(finite, st.floats(0, 1e3)), min_size=1, max_size=30))
def test_the_envelope_rises_below_all_points(points: list[tuple[float, float]]) -> None:
    envelope = lower_envelope(points)
    ys = [y for _, y in envelope]
    assert ys == sorted(ys)
    assert all(y <= point[1] for (_, y), point in zip(envelope, sorted(points), strict=True))


def test_curves_interpolate_and_go_on() -> None:
    curve = fit_curve([(1.0, 5.0), (2.0, 5.0), (4.0, 9.0), (3.0, 99.0)], [2.0])
    assert curve.knots == [(1.0, 5.0), (2.0, 5.0), (4.0, 9.0)]
    assert [curve.seconds(x) for x in (0.0, 3.0, 8.0)] == [5.0, 7.0, 17.0]
    assert interpolate([0, 10], [1.0, 2.0], -100) == 0.0
    with pytest.raises(ConfigError):
        Curve([(1.0, 2.0), (2.0, 1.0)])


def test_the_simplex_finds_a_valley() -> None:
    def valley(p: tuple[float, ...]) -> float:
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    assert minimise(valley, (-1.0, 2.0), step=0.5, num_rounds=300) == pytest.approx(
        (1, 1), abs=0.01
    )


def test_a_fit_recovers_the_rate_that_made_the_points() -> None:
    true = GemmRate(5e-6, 3e-10, 1.5e12, 2e14, 2.0)
    rng = random.Random(5)
    points = [
        GemmPoint(m, n, k, 1, 4096, true.seconds(m, n, k, 2) * rng.uniform(0.97, 1.03))
        for m in (1, 4, 16, 64, 128, 256, 512, 2048, 8192)
        for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 1024))
    ]
    fitted = fit_gemm(points, GemmRate(3e-6, 2e-10, 1e12, 3e14, 1.5))
    assert fitted.flops_per_s == pytest.approx(true.flops_per_s, rel=0.05)
    assert fitted.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.05)
    assert all(error.median < 0.03 for error in gemm_errors(points, fitted))


def test_linear_fit() -> None:
    true = LinearRate(2e-6, 1e12)
    fitted = fit_linear(
        [(1 << b, true.seconds(1 << b)) for b in range(10, 28)], LinearRate(1e-5, 1e11)
    )
    assert fitted.launch_s == pytest.approx(2e-6, rel=0.02)
    assert fitted.bytes_per_s == pytest.approx(1e12, rel=0.02)


def test_committed_h100_rates_match_its_measurements() -> None:
    rates = load_rates("H100-80GB")
    points = read_gemms(GEMMS)
    assert all(error.median < 0.07 for error in gemm_errors(points, rates.gemm))
    assert all(error.p90 < 0.04 for error in layer_errors(points, rates.gemm))
    for point in read_all_reduces(ALL_REDUCE):
        predicted = all_reduce_curve(rates, point.ranks).seconds(point.num_bytes)
        assert predicted == pytest.approx(point.seconds, rel=1e-6)


def test_wider_groups_than_measured_are_derived_and_say_so() -> None:
    rates = load_rates("H100-80GB")
    eight = all_reduce_curve(rates, 8)
    assert not eight.measured
    assert eight.seconds(1 << 24) > all_reduce_curve(rates, 4).seconds(1 << 24)
    bare = msgspec.structs.replace(rates, all_reduce={})
    with pytest.raises(ConfigError, match="TP2"):
        all_reduce_curve(bare, 2)


def test_every_committed_file_names_its_sources() -> None:
    for name in ("A100-80GB", "H100-80GB", "CPU"):
        rates = load_rates(name)
        assert rates.gpu == name
        assert rates.source
    with pytest.raises(ConfigError, match="calibrate"):
        load_rates("B900")


def test_the_command_prints_errors_and_writes_constants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rates.json"
    argv = ["--gpu", "NEW", "--base", "H100-80GB", "--ops", str(GEMMS), "--out", str(out)]
    assert main([*argv, "--all-reduce", str(ALL_REDUCE), "--source", "a test"]) == 0
    printed = capsys.readouterr().out
    assert "TP2 layer" in printed
    assert "2 ranks, over 1 MiB" in printed
    written = msgspec.json.decode(out.read_bytes(), type=Rates)
    assert (written.gpu, written.source) == ("NEW", ["a test"])


def test_the_command_reads_vidur_profiles(tmp_path: Path) -> None:
    ops = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "attn_rope")
    ops += ("input_layernorm", "post_attention_layernorm", "mlp_act", "add")
    header = [f"time_stats.{op}.median" for op in ops]
    header += ["n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens"]
    row = [*("0.05",) * len(ops), "32", "8", "4096", "14336", "128"]
    path = tmp_path / "ops.csv"
    path.write_text(
        ",".join([*header, "num_tensor_parallel_workers"]) + "\n" + ",".join([*row, "2"]) + "\n"
    )
    sizes = [(p.outputs, p.inputs) for p in read_gemms(path)]
    assert sizes == [(3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
    assert read_gemms(path)[0].seconds == pytest.approx(50e-6)


def test_bad_profiles_are_named_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ops.csv"
    path.write_text("rows,outputs,inputs,degree,hidden,seconds\n1,2,3,1,3,1e-3\n1,x,3,1,3,1e-3\n")
    assert main(["--ops", str(path)]) == 2
    assert "line 3" in capsys.readouterr().err
    path.write_text("rows\n")
    with pytest.raises(ConfigError, match="holds no rows"):
        read_gemms(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_gemms(tmp_path / "none.csv")
    assert main([]) == 2
