"""A GGUF file's metadata as a Hugging Face `config.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nitsum.errors import CheckpointError
from nitsum.model.rope import inverse_frequencies, llama3_factors
from nitsum.shape import RopeScaling

if TYPE_CHECKING:
    from gguf import GGUFReader

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

rope_factors_name = "rope_freqs.weight"
"""Llama 3.1's rope scaling, stored as a divisor for each frequency."""


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """`config.json` of the model; `CheckpointError` for what would be computed wrongly."""
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise CheckpointError(
            f"GGUF architecture {architecture!r} is not supported. Supported: {known}."
        )
    if _field(reader, f"{architecture}.expert_count", 0):
        raise CheckpointError("GGUF models with experts are not supported.")
    names = {tensor.name for tensor in reader.tensors}
    config = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "dtype": "float32",
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in names,
        **_sizes(reader, architecture),
        **_tokens(reader),
    }
    config["rope_parameters"] = _rope(reader, architecture, config["head_dim"])
    return config


_REQUIRED: Any = object()


def _field(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    field = reader.fields.get(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise CheckpointError(f"The GGUF file lacks {key!r}; convert the model again.")
    return default


def _sizes(reader: GGUFReader, architecture: str) -> dict[str, Any]:
    def value(key: str, default: Any = _REQUIRED) -> Any:
        return _uniform(key, _field(reader, f"{architecture}.{key}", default))

    heads, hidden = value("attention.head_count"), value("embedding_length")
    return {
        "num_hidden_layers": value("block_count"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "vocab_size": _num_tokens(reader),
    }


def _uniform(key: str, value: Any) -> Any:
    """Some files give a number per layer; only equal ones are a model this decoder knows."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(f"GGUF models whose layers differ ({key}) are not supported.")
    return value[0]


def _num_tokens(reader: GGUFReader) -> int:
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            return int(tensor.shape[1])
    raise CheckpointError("The GGUF file has no token_embd.weight.")


def _tokens(reader: GGUFReader) -> dict[str, Any]:
    """bos, and every id that ends a text: end of sequence, and end of turn where it differs."""
    stops = [
        _field(reader, f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")
    ]
    ends = list(dict.fromkeys(stop for stop in stops if stop is not None))
    return {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def _rope(reader: GGUFReader, architecture: str, head_dim: int) -> dict[str, Any]:
    prefix = f"{architecture}.rope."
    if _field(reader, f"{prefix}dimension_count", head_dim) != head_dim:
        raise CheckpointError("GGUF models that rotate a part of each head are not supported.")
    theta = float(_field(reader, f"{prefix}freq_base", 10000.0))
    kind = _field(reader, f"{prefix}scaling.type", "none")
    if kind == "linear":
        factor = float(_field(reader, f"{prefix}scaling.factor"))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        raise CheckpointError(f"GGUF rope scaling {kind!r} is not supported (linear is).")
    for tensor in reader.tensors:
        if tensor.name == rope_factors_name:
            return _llama3(np.asarray(tensor.data, dtype=np.float32), theta, head_dim)
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The rule that made `factors`, which all Llama 3.1 and later models share but for `factor`."""
    factor = round(float(factors.max()), 3)
    rope = RopeScaling("llama3", theta, factor)
    plain = inverse_frequencies(RopeScaling(theta=theta), head_dim, torch.device("cpu"))
    made = llama3_factors(rope, plain).numpy()
    if made.shape != factors.shape or not np.allclose(made, factors, rtol=1e-4):
        raise CheckpointError("The GGUF file's rope_freqs.weight follows no rule known here.")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
