"""Settings out of a checkpoint, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nitsum.errors import CheckpointError, ConfigError
from nitsum.server.settings import ServerSettings
from tests.server.server_kit import Bench, make_checkpoint, settings_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 96,
    "eos_token_id": [3, 4],
    "bos_token_id": 1,
}


def test_facts_of_the_model_come_from_its_configuration(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    settings = ServerSettings.from_checkpoint(folder, port=0, api_key="k")
    assert settings.model_names == ("tiny",)
    assert (settings.max_model_len, settings.vocab_size) == (96, 512)
    assert (settings.eos_token_ids, settings.bos_token_id) == ((3, 4), 1)
    assert settings.api_key == "k"
    named = ServerSettings.from_checkpoint(folder, model_names=("a",), max_model_len=50)
    assert (named.model_names, named.max_model_len) == (("a",), 50)


def test_the_tokenizers_end_token_ends_answers_too(tmp_path: Path) -> None:
    bench = Bench(make_checkpoint(tmp_path / "m"), eos_token_ids=(3, 4)).says("x")
    bench.chat()
    assert bench.sent.sampling.stop_token_ids == (3, 4, bench.codec.eos_id)


@pytest.mark.parametrize(
    "changes",
    [{"model_names": ()}, {"default_tier": "gold"}, {"max_model_len": 0}, {"max_choices": 0}],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings_of(tmp_path, **changes)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ServerSettings.from_checkpoint(tmp_path)
