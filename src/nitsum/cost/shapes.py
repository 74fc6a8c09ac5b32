"""Model shapes by name, for planning and simulating without a checkpoint.

Numbers are those of the published `config.json` files on Hugging Face.
"""

from __future__ import annotations

import json
from pathlib import Path

from nitsum.errors import ConfigError
from nitsum.shape import ModelShape


def _llama(layers: int, hidden: int, heads: int, mlp: int, kv: int = 8) -> ModelShape:
    return ModelShape("llama", layers, hidden, heads, kv, hidden // heads, mlp, 128_256, 131_072)


def _qwen2(
    layers: int, hidden: int, heads: int, kv: int, mlp: int, *, vocab: int = 152_064, tied: bool
) -> ModelShape:
    return ModelShape(
        "qwen2",
        layers,
        hidden,
        heads,
        kv,
        hidden // heads,
        mlp,
        vocab,
        32_768,
        tie_embeddings=tied,
        qkv_bias=True,
    )


def _qwen3(layers: int, hidden: int, heads: int, mlp: int, *, tied: bool = False) -> ModelShape:
    return ModelShape(
        "qwen3",
        layers,
        hidden,
        heads,
        8,
        128,
        mlp,
        151_936,
        40_960,
        tie_embeddings=tied,
        qk_norm=True,
    )


SHAPES = {
    "Llama-3.2-1B": ModelShape(
        "llama", 16, 2048, 32, 8, 64, 8192, 128_256, 131_072, tie_embeddings=True
    ),
    "Llama-3.2-3B": ModelShape(
        "llama", 28, 3072, 24, 8, 128, 8192, 128_256, 131_072, tie_embeddings=True
    ),
    "Llama-3.1-8B": _llama(32, 4096, 32, 14_336),
    "Llama-3.1-70B": _llama(80, 8192, 64, 28_672),
    "Llama-3.1-405B": _llama(126, 16_384, 128, 53_248),
    "Mistral-7B-v0.3": ModelShape("mistral", 32, 4096, 32, 8, 128, 14_336, 32_768, 32_768),
    "Qwen2.5-0.5B": _qwen2(24, 896, 14, 2, 4864, vocab=151_936, tied=True),
    "Qwen2.5-1.5B": _qwen2(28, 1536, 12, 2, 8960, vocab=151_936, tied=True),
    "Qwen2.5-7B": _qwen2(28, 3584, 28, 4, 18_944, tied=False),
    "Qwen2.5-14B": _qwen2(48, 5120, 40, 8, 13_824, tied=False),
    "Qwen2.5-32B": _qwen2(64, 5120, 40, 8, 27_648, tied=False),
    "Qwen2.5-72B": _qwen2(80, 8192, 64, 8, 29_568, tied=False),
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12_288),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17_408),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25_600),
    "SmolLM2-135M": ModelShape("llama", 30, 576, 9, 3, 64, 1536, 49_152, 8192, tie_embeddings=True),
}


DEMO_NAME = "demo"
"""The model of `nitsum serve demo`."""


def shape_named(name: str) -> ModelShape:
    """A shape by name, or read from a checkpoint folder or a `config.json`.

    Raises `ConfigError` for a name that is neither, `CheckpointError` for a model that is not
    supported.
    """
    for known, shape in SHAPES.items():
        if known.lower() == name.lower():
            return shape
    path = Path(name)
    if path.is_dir():
        return ModelShape.from_folder(path)
    if path.is_file():
        return ModelShape.from_hf(_read_config(path))
    if name == DEMO_NAME:
        return SHAPES["SmolLM2-135M"]
    raise ConfigError(
        f"{name!r} is neither a folder with a config.json nor a known model shape. "
        f"Known: {DEMO_NAME}, {', '.join(SHAPES)}."
    )


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a Hugging Face config.json: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a Hugging Face config.json: it holds no mapping.")
    return config  # pyright: ignore[reportUnknownVariableType]
