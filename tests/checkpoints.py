"""Small random checkpoints, written by `transformers`: what parity is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 100,
    "vocab_size": 203,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""By default nothing divides: 3 KV heads, 100 wide, 203 tokens."""


def write_checkpoint(
    folder: Path, family: str, *, seed: int = 0, max_shard_size: str = "50GB", **overrides: Any
) -> PreTrainedModel:
    """Write a float32 checkpoint of `family` (llama, mistral, qwen2, qwen3) and return its model.

    `overrides` are fields of the Hugging Face config. Weights are large enough for every part to
    matter: swapped KV heads, a missing bias or a wrong position change the NLL by more than 0.1.
    A small `max_shard_size` ("20KB") gives several files and an index.
    """
    make_config, make_model = _CLASSES[family]
    config = make_config(**(SIZES | overrides))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = make_model(config).eval()
    _enlarge(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def _enlarge(model: PreTrainedModel) -> None:
    """Scores of attention and logits with a standard deviation of a few units; no weight is 0."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.7, 1.3)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
        elif "q_proj" in name or "k_proj" in name:
            parameter.normal_(0.0, 1.6 * parameter.shape[1] ** -0.5)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(0.0, 3.0 * parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(0.0, 1.4 * parameter.shape[1] ** -0.5)


def nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood, nats, of tokens [n] after the first; logits [n, vocabulary]."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:]).item()
