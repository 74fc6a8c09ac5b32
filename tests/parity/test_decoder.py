"""Logits and NLL of every degree against `transformers`, with heads that do not divide."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nitsum.model.checkpoint import DummySource, FolderSource
from nitsum.plan import Group
from nitsum.shape import Geometry, ModelShape
from nitsum.worker.weights import ResidentWeights, load_weights
from tests.checkpoints import LINEAR_ROPE, LLAMA3_ROPE, nll, write_checkpoint
from tests.lanes import Part, ThreadLane, compose

torch.set_num_threads(1)

TOLERANCE = 1e-5
"""Largest difference of a logit over the largest logit, float32."""
LENGTH = 23

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 6}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}
ALL_DEGREES = ("llama-biases", "qwen3", "llama-one-kv-head")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def written(name: str) -> tuple[Path, PreTrainedModel]:
        family, overrides = MODELS[name]
        folder = tmp_path_factory.mktemp(name)
        return folder, write_checkpoint(folder, family, **overrides)

    return written


def tokens_of(vocab_size: int, length: int = LENGTH, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def make_lane(
    folder: Path,
    max_tp: int,
    degree: int,
    min_tp: int = 1,
    index: int = 0,
    dtype: torch.dtype = torch.float32,
) -> ThreadLane:
    geometry = Geometry(ModelShape.from_folder(folder), max_tp, min_tp)
    group = Group(degree, index)
    source = FolderSource(folder)

    def views(rank: int):
        weights = load_weights(geometry, rank, source, dtype=dtype)
        return weights.views(degree, group.shard_of(rank))

    return ThreadLane(geometry, group, views)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0]


def check_parity(ours: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> None:
    assert ours.shape == reference.shape
    assert ours.dtype == torch.float32
    assert (ours - reference).abs().max() < TOLERANCE * reference.abs().max()
    assert abs(nll(ours, tokens) - nll(reference, tokens)) < 1e-4


def whole_prompt(lane: ThreadLane, tokens: torch.Tensor) -> torch.Tensor:
    part = Part(tokens.tolist(), 0, pages=[9, 3, 17, 4, 11, 1])
    return lane.step(compose([part], lane.block_tokens, all_rows=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("max_tp", "degree"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_families(checkpoints: Any, name: str, max_tp: int, degree: int) -> None:
    folder, model = checkpoints(name)
    tokens = tokens_of(model.config.vocab_size)
    ours = whole_prompt(make_lane(folder, max_tp, degree), tokens)
    check_parity(ours, reference_logits(model, tokens), tokens)


@pytest.mark.parametrize("name", ALL_DEGREES)
@pytest.mark.parametrize(
    ("min_tp", "degree"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (8, 8)]
)
def test_every_degree_of_eight(checkpoints: Any, name: str, min_tp: int, degree: int) -> None:
    """8 ranks exceed 3 KV heads: k and v are replicated and kept apart from q."""
    folder, model = checkpoints(name)
    tokens = tokens_of(model.config.vocab_size)
    last = 8 // degree - 1
    ours = whole_prompt(make_lane(folder, 8, degree, min_tp, index=last), tokens)
    check_parity(ours, reference_logits(model, tokens), tokens)


@pytest.mark.parametrize("degree", [1, 2])
def test_chunks_decodes_and_mixed_steps_equal_one_pass(checkpoints: Any, degree: int) -> None:
    folder, model = checkpoints("qwen3")
    lane = make_lane(folder, 4, degree)
    a, b = (tokens_of(model.config.vocab_size, 14, seed) for seed in (1, 2))
    a_pages, b_pages = [5, 2, 8, 1], [3, 7, 4, 6]

    def step(*parts: Part) -> torch.Tensor:
        return lane.step(compose(parts, lane.block_tokens, all_rows=True))

    ours_a = [step(Part(a[:5].tolist(), 0, a_pages))]
    ours_b: list[torch.Tensor] = []
    mixed = step(Part(a[5:6].tolist(), 5, a_pages), Part(b[:6].tolist(), 0, b_pages))
    ours_a.append(mixed[:1])
    ours_b.append(mixed[1:])
    mixed = step(Part(b[6:11].tolist(), 6, b_pages), Part(a[6:7].tolist(), 6, a_pages))
    ours_b.append(mixed[:5])
    ours_a.append(mixed[5:])
    mixed = step(Part(a[7:11].tolist(), 7, a_pages))
    ours_a.append(mixed)
    for at in range(11, 14):
        both = step(
            Part(a[at : at + 1].tolist(), at, a_pages), Part(b[at : at + 1].tolist(), at, b_pages)
        )
        ours_a.append(both[:1])
        ours_b.append(both[1:])
    check_parity(torch.cat(ours_a), reference_logits(model, a), a)
    check_parity(torch.cat(ours_b), reference_logits(model, b), b)


def test_decodes_of_very_different_lengths(checkpoints: Any) -> None:
    """One long and three short sequences, attended in groups, in an order that mixes them."""
    folder, model = checkpoints("llama")
    lane = make_lane(folder, 2, 1)
    lengths = [3, 60, 2, 5]
    texts = [tokens_of(model.config.vocab_size, n, n) for n in lengths]
    pages = [[1], list(range(2, 17)), [17], [18, 19]]
    for text, own in zip(texts, pages, strict=True):
        lane.step(compose([Part(text[:-1].tolist(), 0, own)], lane.block_tokens))
    parts = [
        Part(text[-1:].tolist(), len(text) - 1, own) for text, own in zip(texts, pages, strict=True)
    ]
    ours = lane.step(compose(parts, lane.block_tokens))
    for row, text in zip(ours, texts, strict=True):
        expected = reference_logits(model, text)[-1]
        assert (row - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_bfloat16_is_as_far_from_float32_as_transformers_is(checkpoints: Any, name: str) -> None:
    folder, model = checkpoints(name)
    tokens = tokens_of(model.config.vocab_size)
    exact = reference_logits(model, tokens)
    rounded = reference_logits(copy.deepcopy(model).bfloat16(), tokens).float()
    ours = whole_prompt(make_lane(folder, 2, 2, dtype=torch.bfloat16), tokens)
    assert 0 < (ours - exact).norm() < 1.5 * (rounded - exact).norm()


def test_a_step_that_samples_nothing_writes_kv(checkpoints: Any) -> None:
    folder, model = checkpoints("llama")
    lane = make_lane(folder, 2, 2)
    step = compose([Part([5, 6, 7], 0, [3])], lane.block_tokens)
    silent = type(step)(**{**vars(step), "sample_rows": step.sample_rows[:0]})
    assert lane.step(silent).shape == (0, model.config.vocab_size)
    keys = lane.pages[lane.group.leader].keys(0)
    assert keys[3, 0, :3].abs().min() > 0
    assert keys[3, 0, 3].abs().max() == 0


def test_swapped_kv_heads_are_seen(checkpoints: Any) -> None:
    """The yardstick itself: a plausible mistake moves the NLL far outside the tolerance."""
    folder, model = checkpoints("llama")
    lane = make_lane(folder, 4, 1)
    tokens = tokens_of(model.config.vocab_size, 24)
    right = nll(whole_prompt(lane, tokens), tokens)
    d, g = lane.geometry.shape.head_dim, lane.geometry.q_per_kv
    rows = lane.weights[0].layers[1].qkv.view(-1, g + 2, d, 48)
    rows[[0, 1], g:] = rows[[1, 0], g:]
    assert abs(nll(whole_prompt(lane, tokens), tokens) - right) > 0.1


def test_dummy_weights_agree_at_every_degree(checkpoints: Any) -> None:
    folder, model = checkpoints("qwen2")
    shape = ModelShape.from_folder(folder)
    tokens = tokens_of(model.config.vocab_size)

    def logits(min_tp: int, degree: int) -> torch.Tensor:
        geometry, group = Geometry(shape, 4, min_tp), Group(degree, 0)

        def views(rank: int):
            weights: ResidentWeights = load_weights(
                geometry, rank, DummySource(shape, seed=3), dtype=torch.float32
            )
            return weights.views(degree, group.shard_of(rank))

        return whole_prompt(ThreadLane(geometry, group, views), tokens)

    reference = logits(1, 1)
    assert reference.std() > 0.1
    check_parity(logits(2, 4), reference, tokens)
