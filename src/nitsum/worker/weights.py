"""One resident copy of a rank's weights, of which every degree's shard is a view."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from nitsum.model.checkpoint import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    DummySource,
    FolderSource,
    WeightSource,
    check_tensors,
    layer_prefix,
)
from nitsum.model.views import LayerWeights, ModelWeights
from nitsum.plan import Group
from nitsum.shape import Geometry, ModelShape
from nitsum.worker.weights_layout import Piece, RankLayout

OnProgress = Callable[[int, int], None]
"""Called with (tensors placed, tensors in all) after each tensor."""


@dataclass(frozen=True)
class ResidentWeights:
    """What a rank holds: shard `layout.shard` of degree min_tp, padded with zeros."""

    layout: RankLayout
    embedding: torch.Tensor  # [padded vocabulary / min_tp, hidden]
    lm_head: torch.Tensor  # the same tensor when tied
    final_norm: torch.Tensor  # [hidden]
    layers: tuple[LayerWeights, ...]
    _views: dict[tuple[int, int], ModelWeights] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors, bytes; tied embeddings count once."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every resident tensor once."""
        tables = {id(tensor): tensor for tensor in (self.embedding, self.lm_head)}
        parts = [getattr(layer, part.name) for layer in self.layers for part in fields(layer)]
        return [
            *tables.values(),
            self.final_norm,
            *(tensor for tensor in parts if tensor is not None),
        ]

    def views(self, degree: int, shard: int) -> ModelWeights:
        """Shard `shard` of `degree`, without a copy; made once.

        `shard` must lie inside what this rank holds, as `Group.shard_of(rank)` always does.
        """
        key = (degree, shard)
        if key not in self._views:
            self._views[key] = self._cut(degree, shard)
        return self._views[key]

    def _cut(self, degree: int, shard: int) -> ModelWeights:
        layout = self.layout
        assert layout.holds(degree, shard), f"shard {shard} of TP{degree} is not on this rank"
        rows = layout.cut(len(layout.tokens), degree, shard)
        holds_all = layout.geometry.min_tp == 1
        return ModelWeights(
            degree,
            shard,
            self.embedding if holds_all else _rows(self.embedding, rows),
            0 if holds_all else layout.tokens.start + rows.start,
            holds_all,
            tuple(_cut_layer(layout, layer, degree, shard) for layer in self.layers),
            self.final_norm,
            _rows(self.lm_head, rows),
        )


def _cut_layer(layout: RankLayout, layer: LayerWeights, degree: int, shard: int) -> LayerWeights:
    qkv = layout.cut(layout.qkv_rows, degree, shard)
    kv = layout.kv_cut(degree, shard)
    gate_up = layout.cut(2 * len(layout.mlp), degree, shard)
    return LayerWeights(
        input_norm=layer.input_norm,
        qkv=_rows(layer.qkv, qkv),
        qkv_bias=_optional_rows(layer.qkv_bias, qkv),
        kv=_optional_rows(layer.kv, kv),
        kv_bias=_optional_rows(layer.kv_bias, kv),
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        o=_columns(layer.o, layout.cut(layout.o_columns, degree, shard)),
        o_bias=layer.o_bias,
        post_norm=layer.post_norm,
        gate_up=_rows(layer.gate_up, gate_up),
        gate_up_bias=_optional_rows(layer.gate_up_bias, gate_up),
        down=_columns(layer.down, layout.cut(len(layout.mlp), degree, shard)),
        down_bias=layer.down_bias,
    )


def _rows(tensor: torch.Tensor, part: range) -> torch.Tensor:
    return tensor.narrow(0, part.start, len(part))


def _optional_rows(tensor: torch.Tensor | None, part: range) -> torch.Tensor | None:
    return None if tensor is None else _rows(tensor, part)


def _columns(tensor: torch.Tensor, part: range) -> torch.Tensor:
    return tensor.narrow(1, part.start, len(part))


# --- allocating --------------------------------------------------------------------------------


def allocate(layout: RankLayout, dtype: torch.dtype, device: torch.device) -> ResidentWeights:
    """Zeros of a rank's sizes: what no checkpoint tensor fills later is padding."""
    shape = layout.geometry.shape

    def zeros(*dims: int) -> torch.Tensor:
        return torch.zeros(dims, dtype=dtype, device=device)

    embedding = zeros(len(layout.tokens), shape.hidden_size)
    lm_head = embedding if shape.tie_embeddings else torch.zeros_like(embedding)
    layers = tuple(_allocate_layer(layout, zeros) for _ in range(shape.num_layers))
    return ResidentWeights(layout, embedding, lm_head, zeros(shape.hidden_size), layers)


def _allocate_layer(layout: RankLayout, zeros: Callable[..., torch.Tensor]) -> LayerWeights:
    shape = layout.geometry.shape
    hidden, splits = shape.hidden_size, layout.geometry.splits_kv
    width = len(layout.mlp)

    def maybe(present: bool, *dims: int) -> torch.Tensor | None:
        return zeros(*dims) if present else None

    return LayerWeights(
        input_norm=zeros(hidden),
        qkv=zeros(layout.qkv_rows, hidden),
        qkv_bias=maybe(shape.qkv_bias, layout.qkv_rows),
        kv=maybe(splits, layout.kv_rows, hidden),
        kv_bias=maybe(splits and shape.qkv_bias, layout.kv_rows),
        q_norm=maybe(shape.qk_norm, shape.head_dim),
        k_norm=maybe(shape.qk_norm, shape.head_dim),
        o=zeros(hidden, layout.o_columns),
        o_bias=maybe(shape.o_bias, hidden),
        post_norm=zeros(hidden),
        gate_up=zeros(2 * width, hidden),
        gate_up_bias=maybe(shape.mlp_bias, 2 * width),
        down=zeros(hidden, width),
        down_bias=maybe(shape.mlp_bias, hidden),
    )


# --- loading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Where one checkpoint tensor's pieces go; they lie along `dim` on both sides."""

    name: str
    tensor: torch.Tensor
    dim: int
    pieces: list[Piece]


def load_weights(
    geometry: Geometry,
    rank: int,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> ResidentWeights:
    """Read a rank's part of `source` straight into place, one tensor at a time.

    Raises `CheckpointError` before anything is read if tensors are missing, unexpected or of
    another shape than `geometry.shape` says.
    """
    check_tensors(source.shapes(), geometry.shape)
    shard = Group(geometry.min_tp, rank // geometry.min_tp).shard_of(rank)
    weights = allocate(RankLayout(geometry, shard), dtype, torch.device(device))
    targets = list(_targets(weights))
    for num_placed, target in enumerate(targets, 1):
        _place(target, source)
        if on_progress is not None:
            on_progress(num_placed, len(targets))
    return weights


def open_source(
    folder: Path,
    shape: ModelShape,
    load_format: Literal["auto", "dummy"],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WeightSource:
    """The folder's own weights (`auto`), or random ones of its config (`dummy`)."""
    if load_format == "dummy":
        return DummySource(shape, seed, device, dtype)
    return FolderSource(folder)


def _place(target: _Target, source: WeightSource) -> None:
    """One read that spans all pieces, then a copy for each."""
    if not target.pieces:
        return
    start = min(piece.src for piece in target.pieces)
    stop = max(piece.src + piece.size for piece in target.pieces)
    part = source.read(target.name, target.dim, start, stop)
    for piece in target.pieces:
        destination = target.tensor.narrow(target.dim, piece.dst, piece.size)
        destination.copy_(part.narrow(target.dim, piece.src - start, piece.size))


def _targets(weights: ResidentWeights) -> Iterator[_Target]:
    vocab = weights.layout.vocab_pieces()
    yield _Target(EMBEDDING, weights.embedding, 0, vocab)
    if weights.lm_head is not weights.embedding:
        yield _Target(LM_HEAD, weights.lm_head, 0, vocab)
    yield _whole(FINAL_NORM, weights.final_norm)
    for index, layer in enumerate(weights.layers):
        yield from _layer_targets(layer_prefix(index), weights.layout, layer)


def _layer_targets(prefix: str, layout: RankLayout, layer: LayerWeights) -> Iterator[_Target]:
    yield from _attention_targets(prefix + "self_attn.", layout, layer)
    yield from _mlp_targets(prefix + "mlp.", layout, layer)
    yield _whole(prefix + "input_layernorm.weight", layer.input_norm)
    yield _whole(prefix + "post_attention_layernorm.weight", layer.post_norm)


def _attention_targets(prefix: str, layout: RankLayout, layer: LayerWeights) -> Iterator[_Target]:
    kv = layer.qkv if layer.kv is None else layer.kv
    kv_bias = layer.qkv_bias if layer.kv is None else layer.kv_bias
    yield from _row_targets(prefix + "q_proj", layer.qkv, layer.qkv_bias, layout.q_pieces())
    yield from _row_targets(prefix + "k_proj", kv, kv_bias, layout.k_pieces())
    yield from _row_targets(prefix + "v_proj", kv, kv_bias, layout.v_pieces())
    yield _Target(prefix + "o_proj.weight", layer.o, 1, layout.o_pieces())
    if layer.o_bias is not None:
        yield _whole(prefix + "o_proj.bias", layer.o_bias)
    if layer.q_norm is not None and layer.k_norm is not None:
        yield _whole(prefix + "q_norm.weight", layer.q_norm)
        yield _whole(prefix + "k_norm.weight", layer.k_norm)


def _mlp_targets(prefix: str, layout: RankLayout, layer: LayerWeights) -> Iterator[_Target]:
    gate_up = (layer.gate_up, layer.gate_up_bias)
    yield from _row_targets(prefix + "gate_proj", *gate_up, layout.gate_pieces())
    yield from _row_targets(prefix + "up_proj", *gate_up, layout.up_pieces())
    yield _Target(prefix + "down_proj.weight", layer.down, 1, layout.down_pieces())
    if layer.down_bias is not None:
        yield _whole(prefix + "down_proj.bias", layer.down_bias)


def _row_targets(
    name: str, weight: torch.Tensor, bias: torch.Tensor | None, pieces: list[Piece]
) -> Iterator[_Target]:
    yield _Target(f"{name}.weight", weight, 0, pieces)
    if bias is not None:
        yield _Target(f"{name}.bias", bias, 0, pieces)


def _whole(name: str, tensor: torch.Tensor) -> _Target:
    return _Target(name, tensor, 0, [Piece(0, 0, tensor.shape[0])])
