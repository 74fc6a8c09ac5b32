"""Command line beats file beats environment beats default; mistakes are named with a remedy."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from nitsum.cli.readers import (
    boolean,
    entries,
    http_url,
    one_of,
    seconds,
    size_bytes,
    text,
    whole_number,
)
from nitsum.cli.settings import ServeSettings
from nitsum.cli.simulate_settings import SimulateSettings
from nitsum.cli.sources import add_flags, keys, resolve, setting, settings_or_error, variable
from nitsum.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sample:
    num_cups: int = setting(whole_number(1, 100), 7, "how many")
    warm: bool = setting(boolean, True, "or cold")
    name: str = setting(text, "", "what to call it", positional=True)


def read(words: list[str], environment: dict[str, str] | None = None) -> tuple[Sample, list[str]]:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    return resolve(Sample, parser.parse_args(words), environment or {})


@pytest.mark.parametrize(
    ("settings", "flag", "word", "hint"),
    [
        (ServeSettings, "--policy", "static", "--controller static"),
        (ServeSettings, "--controller", "fcfs", "--policy fcfs"),
        (SimulateSettings, "--policy", "static", "--no-control"),
    ],
)
def test_a_word_of_another_flag_is_told_its_flag(settings: type, flag: str, word: str, hint: str):
    parser = argparse.ArgumentParser()
    add_flags(parser, settings, config=False)
    _, problems = resolve(settings, parser.parse_args([flag, word]), {})
    assert [problem for problem in problems if f"({word} is said with {hint})" in problem]


@pytest.fixture
def file(tmp_path: Path):
    def write(content: str) -> str:
        path = tmp_path / "nitsum.yaml"
        path.write_text(content)
        return str(path)

    return write


def test_defaults_stand_when_nothing_is_given():
    assert read([]) == (Sample(), [])


def test_each_source_beats_the_ones_below(file):
    path = file("num-cups: 20\n")
    environment = {"NITSUM_NUM_CUPS": "10", "NITSUM_WARM": "no"}
    assert read([], environment)[0].num_cups == 10
    assert read(["--config", path], environment)[0] == Sample(num_cups=20, warm=False)
    assert read(["--config", path, "--num-cups", "30"], environment)[0].num_cups == 30


def test_the_file_may_be_named_by_a_variable(file):
    assert read([], {"NITSUM_CONFIG": file("num-cups: 3")})[0].num_cups == 3


def test_switches_and_positional_arguments():
    assert read(["--no-warm", "tea"])[0] == Sample(warm=False, name="tea")


def test_every_problem_is_reported_with_its_place(file):
    path = file("num_cup: 1\nwarm: maybe\n")
    found, problems = read(["--config", path, "--num-cups", "0"], {"NITSUM_WRAM": "1"})
    assert found == Sample()
    assert len(problems) == 4
    text_of_all = "\n".join(problems)
    assert f"{path}: unknown key 'num_cup'. Did you mean 'num-cups'?" in text_of_all
    assert f"{path}: warm: true or false is expected, not 'maybe'." in text_of_all
    assert "--num-cups: a whole number of at least 1 and at most 100 is expected" in text_of_all
    assert "Unknown variable NITSUM_WRAM. Did you mean 'NITSUM_WARM'?" in text_of_all


def test_variables_that_resemble_no_setting_are_left_alone():
    assert read([], {"NITSUM_SERVICE_HOST": "10.0.0.1", "NITSUM_CACHE": "/tmp"})[1] == []


def test_a_variable_set_by_kubernetes_is_explained():
    _, problems = read([], {"NITSUM_NUM_CUPS": "tcp://10.0.0.1:80"})
    assert "enableServiceLinks" in problems[0]


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "just words"])
def test_a_file_that_is_no_mapping(file, content: str):
    assert len(read(["--config", file(content)])[1]) == 1


def test_an_empty_file_says_nothing(file):
    assert read(["--config", file("# nothing yet\n")]) == (Sample(), [])


def test_a_missing_file_is_named(tmp_path: Path):
    _, problems = read(["--config", str(tmp_path / "absent.yaml")])
    assert "absent.yaml cannot be read" in problems[0]


def test_settings_or_error_raises_with_all_problems():
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    with pytest.raises(ConfigError, match="--num-cups"):
        settings_or_error(Sample, parser.parse_args(["--num-cups", "many"]), {})


def test_every_serve_setting_can_come_from_every_source():
    """No two settings share a variable, and every default passes through argparse's help."""
    variables = [variable(key) for key in keys(ServeSettings)]
    assert len(set(variables)) == len(variables)
    parser = argparse.ArgumentParser()
    add_flags(parser, ServeSettings)
    help_text = parser.format_help()
    assert all(f"--{key}" in help_text for key in keys(ServeSettings) if key != "model")


# --- readers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1024, 1024),
        ("0", 0),
        ("512", 512),
        ("256MiB", 256 << 20),
        ("1.5 GiB", 3 << 29),
        ("2gb", 2 * 10**9),
        ("64kib", 64 << 10),
    ],
)
def test_sizes(written: object, expected: int):
    assert size_bytes(written) == expected


@pytest.mark.parametrize("written", ["12 parsecs", "-1", "", -1, True, None, 1.5])
def test_what_is_no_size(written: object):
    with pytest.raises(ValueError, match="256MiB"):
        size_bytes(written)


@pytest.mark.parametrize("written", ["abc", True, 1.5, None, "1.5"])
def test_what_is_no_whole_number(written: object):
    with pytest.raises(ValueError, match="whole number"):
        whole_number()(written)


@pytest.mark.parametrize("written", ["inf", "nan", -1, "soon", True, None])
def test_what_is_no_duration(written: object):
    with pytest.raises(ValueError, match="seconds"):
        seconds(written)


def test_seconds_and_words():
    assert seconds("0.5") == 0.5
    assert seconds(30) == 30.0
    assert one_of("cpu", "cuda")("cuda") == "cuda"
    assert http_url("http://collector:4318") == "http://collector:4318"
    for wrong in ("collector:4318", "https://", "ftp://x", "", 5, "http://[::1"):
        with pytest.raises(ValueError, match="URL"):
            http_url(wrong)
    with pytest.raises(ValueError, match="cpu, cuda"):
        one_of("cpu", "cuda")("tpu")


def test_lists_inline_in_yaml_and_in_a_file(tmp_path: Path):
    assert entries("TP2, 2xTP1") == ("TP2", "2xTP1")
    assert entries(["TP2"]) == ("TP2",)
    path = tmp_path / "plans.yaml"
    path.write_text("- TP2\n- name: both\n  lanes: []\n")
    assert entries(str(path)) == ("TP2", {"name": "both", "lanes": []})


@pytest.mark.parametrize("written", ["", [], None, {"a": 1}])
def test_what_is_no_list(written: object):
    with pytest.raises(ValueError, match="list"):
        entries(written)


def test_a_list_file_must_hold_a_list(tmp_path: Path):
    path = tmp_path / "plans.yaml"
    path.write_text("name: x\n")
    with pytest.raises(ValueError, match="should hold a list"):
        entries(str(path))
