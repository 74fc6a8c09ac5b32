"""Where weights come from: a Hugging Face folder, or random numbers of the right shapes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from nitsum.errors import CheckpointError, MissingDependency
from nitsum.shape import ModelShape

Dims = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


class WeightSource(Protocol):
    """Named tensors that can be read in parts."""

    def shapes(self) -> dict[str, Dims]:
        """Every tensor there is."""
        ...

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`tensor.narrow(dim, start, stop - start)`, any dtype."""
        ...


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def expected_shapes(shape: ModelShape) -> dict[str, Dims]:
    """Names and shapes of a checkpoint's tensors; `lm_head` only if it is not the embedding."""
    table = (shape.vocab_size, shape.hidden_size)
    names: dict[str, Dims] = {EMBEDDING: table, FINAL_NORM: (shape.hidden_size,)}
    if not shape.tie_embeddings:
        names[LM_HEAD] = table
    layer = dict(_layer_shapes(shape))
    for index in range(shape.num_layers):
        names |= {layer_prefix(index) + name: dims for name, dims in layer.items()}
    return names


def _layer_shapes(shape: ModelShape) -> Iterator[tuple[str, Dims]]:
    hidden, d, width = shape.hidden_size, shape.head_dim, shape.intermediate_size
    q, kv = shape.num_q_heads * d, shape.num_kv_heads * d
    yield from _linear("self_attn.q_proj", (q, hidden), shape.qkv_bias)
    yield from _linear("self_attn.k_proj", (kv, hidden), shape.qkv_bias)
    yield from _linear("self_attn.v_proj", (kv, hidden), shape.qkv_bias)
    yield from _linear("self_attn.o_proj", (hidden, q), shape.o_bias)
    yield from _linear("mlp.gate_proj", (width, hidden), shape.mlp_bias)
    yield from _linear("mlp.up_proj", (width, hidden), shape.mlp_bias)
    yield from _linear("mlp.down_proj", (hidden, width), shape.mlp_bias)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if shape.qk_norm:
        yield "self_attn.q_norm.weight", (d,)
        yield "self_attn.k_norm.weight", (d,)


def _linear(name: str, dims: Dims, has_bias: bool) -> Iterator[tuple[str, Dims]]:
    yield f"{name}.weight", dims
    if has_bias:
        yield f"{name}.bias", dims[:1]


def check_tensors(found: dict[str, Dims], shape: ModelShape) -> None:
    """Raise `CheckpointError` naming what is missing, unexpected or of another shape."""
    expected = expected_shapes(shape)
    unexpected = {name for name in found.keys() - expected.keys() if not _is_ignored(name, shape)}
    problems = [
        _listed("missing", sorted(expected.keys() - found.keys())),
        _listed("unexpected", sorted(unexpected)),
        _listed(
            "of another shape than config.json says",
            [
                f"{name} {list(found[name])} instead of {list(dims)}"
                for name, dims in expected.items()
                if name in found and found[name] != dims
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"The checkpoint does not fit its config.json ({shape.family}): "
            + "; ".join(filter(None, problems))
            + ". Check that the download is complete and the model is unmodified."
        )


def _is_ignored(name: str, shape: ModelShape) -> bool:
    """Copies of what is known already: a tied lm_head, rotary frequencies of old exports."""
    return name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and shape.tie_embeddings)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{what}: {', '.join(names[:8])}{more}"


class FolderSource:
    """The safetensors files of a Hugging Face folder; read parts, never held as a whole."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            file = _open(path)
            self._files |= dict.fromkeys(file.keys(), file)

    def shapes(self) -> dict[str, Dims]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        part = self._files[name].get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder} has no *.safetensors files. Convert the checkpoint to safetensors, or start "
            "with random weights (--load-format dummy)."
        )
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: the index names files that are not there: {', '.join(absent)}. "
            "Finish the download."
        )
    return paths


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependency(
            "Reading weights needs safetensors: install nitsum[cpu]."
        ) from error
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download it again.") from error


class DummySource:
    """Random weights of any shape. A tensor depends on its name and the seed only.

    Numbers come from `device`'s generator, so ranks agree if their devices are of one kind.
    """

    def __init__(
        self,
        shape: ModelShape,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shapes = expected_shapes(shape)
        self._seed = seed
        self._device = torch.device(device)
        self._dtype = dtype

    def shapes(self) -> dict[str, Dims]:
        return self._shapes

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._generate(name).narrow(dim, start, stop - start)

    def _generate(self, name: str) -> torch.Tensor:
        dims = self._shapes[name]
        tensor = torch.empty(dims, device=self._device, dtype=self._dtype)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        generator = torch.Generator(self._device)
        generator.manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        # Products of matrices keep the scale of their input; the residual stream starts small.
        std = 0.02 if name == EMBEDDING or len(dims) == 1 else dims[-1] ** -0.5
        return tensor.normal_(0.0, std, generator=generator)
