"""GGUF files become folders that compute what the file's model computes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nitsum.errors import CheckpointError
from nitsum.model import gguf as conversion
from nitsum.model.checkpoint import FolderSource, check_tensors
from nitsum.model.gguf import convert_gguf
from nitsum.shape import ModelShape
from tests.checkpoints import LLAMA3_ROPE, write_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
DEMO_GGUF = os.environ.get("NITSUM_TEST_GGUF", "")

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    middle, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[middle]}.{kind}"


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama models."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    quantization: gguf.GGMLQuantizationType | None = None,
    vocabulary: Tokenizer | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    if vocabulary is not None:
        add_vocabulary(writer, vocabulary, config.vocab_size)
    for name, values in gguf_tensors(model, architecture):
        add_tensor(writer, name, values, quantization)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        projection = name.split(".")[-2]
        if architecture == "llama" and projection in heads:
            values = permute(values, heads[projection])
        yield gguf_name(name), np.ascontiguousarray(values)


def add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: np.ndarray,
    quantization: gguf.GGMLQuantizationType | None,
) -> None:
    if quantization is None or values.ndim == 1:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, quantization), raw_dtype=quantization)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Tokenizer, size: int) -> None:
    model = json.loads(vocabulary.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<|unused{index}|>" for index in range(size - len(tokens))]
    control = gguf.TokenType.CONTROL
    types = [control if t.startswith("<|") else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_chat_template("{{ messages[0]['content'] }}")


def make_vocabulary() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    specials = ["<|endoftext|>", "<|start|>", "<|end|>"]
    trainer = BpeTrainer(
        vocab_size=290,
        special_tokens=specials,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello there, hello world"] * 3, trainer)
    return tokenizer


def check_same_weights(folder: Path, model: PreTrainedModel) -> None:
    shape = ModelShape.from_folder(folder)
    check_tensors(FolderSource(folder).shapes(), shape)
    expected = model.state_dict()
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_weights_and_config_survive(tmp_path: Path, family: str, overrides: dict) -> None:
    model = write_checkpoint(tmp_path / "hf", family, **SIZES, **overrides)
    write_gguf(tmp_path / "model.gguf", model, family)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    check_same_weights(tmp_path / "converted", model)
    ours = ModelShape.from_folder(tmp_path / "converted")
    theirs = ModelShape.from_folder(tmp_path / "hf")
    assert vars(ours) == vars(theirs) | {
        "eos_token_ids": (2, 3),
        "rms_eps": pytest.approx(theirs.rms_eps, rel=1e-6),
    }


def test_quantized_files_equal_what_transformers_reads(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", "llama", **SIZES, vocab_size=300)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, "llama", gguf.GGMLQuantizationType.Q8_0, make_vocabulary())
    convert_gguf(path, tmp_path / "converted")
    check_same_weights(tmp_path / "converted", read_by_transformers(path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    ids = tokenizer("hello world<|end|>").input_ids
    assert ids[-1] == 2
    assert tokenizer.decode(ids[:-1]) == "hello world"
    chat = [{"role": "user", "content": "as said"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "as said"


def read_by_transformers(path: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about read-only arrays
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )


def test_large_models_are_written_in_parts(tmp_path: Path, monkeypatch) -> None:
    model = write_checkpoint(tmp_path / "hf", "llama", **SIZES)
    write_gguf(tmp_path / "model.gguf", model, "llama")
    monkeypatch.setattr(conversion, "SHARD_BYTES", 100_000)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    files = sorted((tmp_path / "converted").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    for file in files:
        assert {index["weight_map"][name] for name in load_file(file)} == {file.name}
    check_same_weights(tmp_path / "converted", model)


def llama3_factors(head_dim: int, factor: float) -> np.ndarray:
    """llama.cpp's own formula, written out: wavelengths against 8192 / 4 and 8192 / 1."""
    frequencies = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama3_rope_is_found_again(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", "llama", **SIZES)
    extra = {"rope_freqs.weight": llama3_factors(16, 32.0)}
    write_gguf(tmp_path / "model.gguf", model, "llama", extra=extra)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")
    rope = ModelShape.from_folder(tmp_path / "converted").rope
    assert (rope.kind, rope.factor) == ("llama3", 32.0)
    assert rope.high_freq_factor == LLAMA3_ROPE["high_freq_factor"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}, "ffn_gate_inp"),
        ({"rope_freqs.weight": np.full(8, 2.0, np.float32)}, "no rule"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, extra: dict[str, np.ndarray], message: str
) -> None:
    model = write_checkpoint(tmp_path / "hf", "llama", **SIZES)
    write_gguf(tmp_path / "model.gguf", model, "llama", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")


def test_files_that_are_not_gguf_and_unknown_models(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="no file"):
        convert_gguf(path, tmp_path / "out")
    path.write_bytes(b"not a model" * 20)
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        convert_gguf(path, tmp_path / "out")
    model = write_checkpoint(tmp_path / "hf", "llama", **SIZES)
    write_gguf(path, model, "gemma2")
    with pytest.raises(CheckpointError, match="gemma2"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.skipif(not DEMO_GGUF, reason="NITSUM_TEST_GGUF names no file")
def test_a_real_file_equals_what_transformers_reads(tmp_path: Path) -> None:
    convert_gguf(Path(DEMO_GGUF), tmp_path)
    check_same_weights(tmp_path, read_by_transformers(Path(DEMO_GGUF)))
