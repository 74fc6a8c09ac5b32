"""GGUF files into Hugging Face folders: float32 weights, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nitsum.errors import CheckpointError, MissingDependency
from nitsum.model.gguf_config import read_config, rope_factors_name

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

SHARD_BYTES = 1 << 30
"""Weights are written, and so held in memory, in files of about this size."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the checkpoint in GGUF file `path` (llama, qwen2 or qwen3) as a folder.

    float32 holds every dequantized value exactly, so the result equals what `transformers` makes of
    the file. Raises `CheckpointError` for a file that cannot be read or an architecture or tensor
    that is not supported, `MissingDependency` without the `hf` extra.
    """
    reader = _open(path)
    config = read_config(reader)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(reader, config, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if "tokenizer.ggml.tokens" in reader.fields:
        _write_tokenizer(path, folder)


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependency("Reading GGUF files needs nitsum[hf].") from error
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}).") from error


# --- weights -----------------------------------------------------------------------------------


def _write_weights(reader: GGUFReader, config: dict[str, Any], folder: Path) -> None:
    """One file after the other, each with an index entry; a single file needs no index."""
    shards = _shards([t for t in reader.tensors if t.name != rope_factors_name])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = _shard_name(number, len(shards))
        tensors = {hf_name(tensor.name): _dequantized(tensor, config) for tensor in shard}
        _save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _shards(tensors: list[ReaderTensor]) -> list[list[ReaderTensor]]:
    """Tensors in file order, cut where a file would pass `SHARD_BYTES`."""
    shards: list[list[ReaderTensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        size = 4 * int(tensor.n_elements)
        if shards[-1] and num_bytes + size > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += size
    return shards


def _shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"


def hf_name(name: str) -> str:
    """A GGUF tensor's Hugging Face name; `CheckpointError` if it has none."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"GGUF tensor {name!r} is not part of a supported model.")


def _dequantized(tensor: ReaderTensor, config: dict[str, Any]) -> np.ndarray:
    """[out, in] or [size], float32."""
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise CheckpointError(
            f"GGUF tensor {tensor.name!r} is stored as {kind}, which cannot be dequantized. "
            "Use another quantization of the model."
        ) from error
    heads = _permuted_heads(tensor.name, config)
    return np.ascontiguousarray(unpermute(values, heads) if heads else values, dtype=np.float32)


def _permuted_heads(name: str, config: dict[str, Any]) -> int:
    """Heads of a tensor whose rows GGUF reorders: q and k of Llama models; else 0."""
    if config["model_type"] != "llama":
        return 0
    if ".attn_q." in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".attn_k." in name else 0


def unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs (i, i + 1) to pairs (i, i + d/2); [rows, ...]."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


# --- tokenizer ---------------------------------------------------------------------------------


def _write_tokenizer(path: Path, folder: Path) -> None:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency("Reading a GGUF file's tokenizer needs nitsum[hf].") from error
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)
