"""The resident layout: every degree's shard is a view, and shards put together are the model."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nitsum.errors import CheckpointError
from nitsum.model.checkpoint import DummySource, FolderSource
from nitsum.plan import Group
from nitsum.shape import Geometry, ModelShape
from nitsum.worker.weights import ResidentWeights, load_weights, open_source
from tests.checkpoints import write_checkpoint

torch.set_num_threads(1)

HEADS = [(6, 3), (4, 4), (7, 1), (12, 2), (9, 3), (16, 8), (10, 5)]


def make_shape(num_q: int, num_kv: int, biases: bool = True, tied: bool = False) -> ModelShape:
    return ModelShape(
        family="qwen3",
        num_layers=1,
        hidden_size=12,
        num_q_heads=num_q,
        num_kv_heads=num_kv,
        head_dim=4,
        intermediate_size=75,
        vocab_size=37,
        max_positions=64,
        tie_embeddings=tied,
        qkv_bias=biases,
        o_bias=biases,
        mlp_bias=biases,
        qk_norm=True,
    )


def load_all(geometry: Geometry) -> dict[int, ResidentWeights]:
    source = DummySource(geometry.shape)
    ranks = range(geometry.max_tp)
    return {rank: load_weights(geometry, rank, source, dtype=torch.float32) for rank in ranks}


def checkpoint_tensor(shape: ModelShape, name: str) -> torch.Tensor:
    dims = DummySource(shape).shapes()[name]
    return DummySource(shape).read(name, 0, 0, dims[0])


def padded_heads(tensor: torch.Tensor, geometry: Geometry, real: int, padded: int) -> torch.Tensor:
    """Rows per KV group, zero-padded: [kv heads, padded, head_dim, ...]"""
    d, shape = geometry.shape.head_dim, geometry.shape
    groups = tensor.view(shape.num_kv_heads, real, d, *tensor.shape[1:])
    out = torch.zeros(geometry.num_kv_heads, padded, *groups.shape[2:])
    out[: shape.num_kv_heads, :real] = groups
    return out


def padded_to(tensor: torch.Tensor, size: int) -> torch.Tensor:
    out = torch.zeros(size, *tensor.shape[1:])
    out[: tensor.shape[0]] = tensor
    return out


def expected_qkv(geometry: Geometry, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(q heads, [k, v] of each KV head) from the checkpoint, padded by other means."""
    shape, prefix = geometry.shape, "model.layers.0.self_attn."
    q, k, v = (checkpoint_tensor(shape, f"{prefix}{name}_proj.{kind}") for name in "qkv")
    queries = padded_heads(q, geometry, shape.q_per_kv, geometry.q_per_kv)
    pairs = [padded_heads(x, geometry, 1, 1) for x in (k, v)]
    return queries, torch.cat(pairs, 1)


def unique_kv(geometry: Geometry, degree: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parts in shard order with replicas of a head, which must be equal, taken once."""
    copies = max(1, degree // geometry.num_kv_heads)
    for first in range(0, degree, copies):
        for other in parts[first : first + copies]:
            torch.testing.assert_close(other, parts[first], rtol=0, atol=0)
    return parts[::copies]


def check_degree(geometry: Geometry, degree: int, ranks: dict[int, ResidentWeights]) -> None:
    """All shards of a group, put together in shard order, are the padded checkpoint."""
    group = Group(degree, geometry.max_tp // degree - 1)
    by_shard = {group.shard_of(rank): ranks[rank] for rank in group.ranks}
    views = [by_shard[shard].views(degree, shard) for shard in range(degree)]
    layers = [view.layers[0] for view in views]
    check_attention(geometry, degree, layers)
    check_mlp(geometry, layers)
    check_vocabulary(geometry, views)


def check_attention(geometry: Geometry, degree: int, layers: list) -> None:
    shape = geometry.shape
    for kind, field in (("weight", ""), ("bias", "_bias")):
        queries, pairs = expected_qkv(geometry, kind)
        ours = torch.cat([getattr(layer, f"qkv{field}") for layer in layers])
        if geometry.splits_kv:
            assert torch.equal(ours, queries.flatten(0, 2))
            parts = [getattr(layer, f"kv{field}") for layer in layers]
            ours = torch.cat(unique_kv(geometry, degree, parts))
            assert torch.equal(ours, pairs.flatten(0, 2))
        else:
            assert torch.equal(ours, torch.cat((queries, pairs), 1).flatten(0, 2))
    o = checkpoint_tensor(shape, "model.layers.0.self_attn.o_proj.weight")
    columns = padded_heads(o.T.contiguous(), geometry, shape.q_per_kv, geometry.q_per_kv)
    assert torch.equal(torch.cat([layer.o for layer in layers], 1).T, columns.flatten(0, 2))


def check_mlp(geometry: Geometry, layers: list) -> None:
    shape, size = geometry.shape, geometry.intermediate_size
    prefix = "model.layers.0.mlp."
    for kind, field in (("weight", ""), ("bias", "_bias")):
        gate, up = (
            padded_to(checkpoint_tensor(shape, f"{prefix}{name}_proj.{kind}"), size)
            for name in ("gate", "up")
        )
        chunks = [x.view(geometry.max_tp, 1, -1, *x.shape[1:]) for x in (gate, up)]
        ours = torch.cat([getattr(layer, f"gate_up{field}") for layer in layers])
        assert torch.equal(ours, torch.cat(chunks, 1).flatten(0, 2))
    down = checkpoint_tensor(shape, f"{prefix}down_proj.weight")
    expected = padded_to(down.T.contiguous(), size)
    assert torch.equal(torch.cat([layer.down for layer in layers], 1).T, expected)


def check_vocabulary(geometry: Geometry, views: list) -> None:
    shape = geometry.shape
    name = "model.embed_tokens.weight" if shape.tie_embeddings else "lm_head.weight"
    lm_head = padded_to(checkpoint_tensor(shape, name), geometry.vocab_size)
    assert torch.equal(torch.cat([view.lm_head for view in views]), lm_head)
    table = padded_to(checkpoint_tensor(shape, "model.embed_tokens.weight"), geometry.vocab_size)
    for view in views:
        rows = range(view.first_token, view.first_token + view.embedding.shape[0])
        assert torch.equal(view.embedding, table[rows.start : rows.stop])
        assert view.holds_all_tokens == (len(rows) == geometry.vocab_size)


@settings(max_examples=40)
@given(
    heads=st.sampled_from(HEADS),
    max_bits=st.integers(0, 3),
    min_bits=st.integers(0, 3),
    tied=st.booleans(),
)
def test_shards_of_every_degree_make_the_padded_model(
    heads: tuple[int, int], max_bits: int, min_bits: int, tied: bool
) -> None:
    geometry = Geometry(make_shape(*heads, tied=tied), 1 << max_bits, 1 << min(min_bits, max_bits))
    ranks = load_all(geometry)
    for bits in range(min(min_bits, max_bits), max_bits + 1):
        check_degree(geometry, 1 << bits, ranks)


def view_tensors(view: object) -> list[torch.Tensor]:
    values = [getattr(view, part.name) for part in fields(view)]  # type: ignore[arg-type]
    return [value for value in values if isinstance(value, torch.Tensor)]


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte address a tensor touches."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    return tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()


def inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


@pytest.mark.parametrize("min_tp", [1, 2])
@pytest.mark.parametrize("heads", [(6, 3), (16, 8), (7, 1)])
def test_views_are_nested_and_take_no_memory(heads: tuple[int, int], min_tp: int) -> None:
    geometry = Geometry(make_shape(*heads), 8, min_tp)
    weights = load_weights(geometry, 5, DummySource(geometry.shape), dtype=torch.float32)
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights.tensors()}
    outer = None
    degree = min_tp
    while degree <= 8:
        view = weights.views(degree, Group(degree, 5 // degree).shard_of(5))
        tensors = view_tensors(view) + view_tensors(view.layers[0])
        assert all(tensor.untyped_storage().data_ptr() in storages for tensor in tensors)
        extents = [extent(tensor) for tensor in tensors]
        if outer is not None:
            assert all(inside(*pair) for pair in zip(extents, outer, strict=True))
        outer, degree = extents, degree * 2


def test_a_view_is_made_once_and_only_of_what_the_rank_holds() -> None:
    geometry = Geometry(make_shape(6, 3), 4, 2)
    weights = load_weights(geometry, 1, DummySource(geometry.shape), dtype=torch.float32)
    assert weights.views(2, 1) is weights.views(2, 1)
    for degree, shard in ((2, 0), (4, 1), (1, 0), (8, 4)):
        with pytest.raises(AssertionError, match="not on this rank"):
            weights.views(degree, shard)


def test_tied_tables_are_one_tensor_and_min_tp_divides_the_memory() -> None:
    shape = make_shape(16, 8, tied=True)
    tied = load_weights(Geometry(shape, 4), 0, DummySource(shape), dtype=torch.float32)
    assert tied.lm_head is tied.embedding
    part = load_weights(Geometry(shape, 4, 4), 0, DummySource(shape), dtype=torch.float32)
    whole = {id(t) for t in (tied.final_norm, *view_tensors(tied.layers[0])) if t.dim() == 1}
    shared = sum(t.nbytes for t in tied.tensors() if id(t) in whole)
    assert abs(part.num_bytes - tied.num_bytes / 4) < shared


# --- loading -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, "llama", num_hidden_layers=2)
    return tmp_path


def load(folder: Path, rank: int = 0, min_tp: int = 1, **kwargs) -> ResidentWeights:
    shape = ModelShape.from_folder(folder)
    source = open_source(folder, shape, "auto")
    options = {"dtype": torch.float32} | kwargs
    return load_weights(Geometry(shape, 4, min_tp), rank, source, **options)


def test_several_files_give_what_one_gives(folder: Path, tmp_path_factory) -> None:
    parts = tmp_path_factory.mktemp("parts")
    write_checkpoint(parts, "llama", num_hidden_layers=2, max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    pairs = zip(load(folder).tensors(), load(parts).tensors(), strict=True)
    assert all(torch.equal(one, several) for one, several in pairs)


def test_stored_dtype_becomes_the_requested_one(folder: Path) -> None:
    reference = load(folder)
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    ours = load(folder)
    assert ours.layers[1].o.dtype == torch.float32
    assert torch.equal(ours.layers[1].o, reference.layers[1].o.bfloat16().float())
    assert load(folder, dtype=torch.bfloat16).embedding.dtype == torch.bfloat16


def test_a_rank_reads_only_its_part(folder: Path) -> None:
    shape = ModelShape.from_folder(folder)
    num_read = {}

    class Counting(FolderSource):
        def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
            part = super().read(name, dim, start, stop)
            num_read[name] = part.numel()
            return part

    load_weights(Geometry(shape, 2, 2), 1, Counting(folder), dtype=torch.float32)
    total = {name: torch.Size(dims).numel() for name, dims in FolderSource(folder).shapes().items()}
    for name in ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj"):
        key = f"model.layers.0.{name}.weight"
        assert num_read[key] < 0.7 * total[key]


def test_progress_counts_every_tensor(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(folder, on_progress=lambda done, total: seen.append((done, total)))
    num = len(FolderSource(folder).shapes())
    assert seen == [(done, num) for done in range(1, num + 1)]


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}),
            "unexpected: model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model.norm.weight \[7\] instead of \[48\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_copies_of_what_is_known_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.rotary_emb.inv_freq": torch.zeros(8)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load(folder)
    assert weights.lm_head is weights.embedding


def test_broken_folders_say_what_to_do(folder: Path, tmp_path_factory) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        FolderSource(tmp_path_factory.mktemp("empty"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not there: model-2\.safetensors"):
        FolderSource(folder)
    (folder / "model-2.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="Download it again"):
        FolderSource(folder)


def test_dummy_weights_depend_on_name_and_seed_only() -> None:
    shape = make_shape(6, 3)
    name = "model.layers.0.mlp.up_proj.weight"
    first = DummySource(shape, seed=1).read(name, 0, 0, 75)
    again = DummySource(shape, seed=1).read(name, 0, 10, 20)
    assert torch.equal(first[10:20], again)
    assert not torch.equal(first, DummySource(shape, seed=2).read(name, 0, 0, 75))
    gate = DummySource(shape, seed=1).read("model.layers.0.mlp.gate_proj.weight", 0, 0, 75)
    assert not torch.equal(first, gate)
