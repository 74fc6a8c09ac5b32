"""The whole decoder over the kernels against the decoder in PyTorch."""

from __future__ import annotations

import pytest
import torch

from nitsum.model.cuda_ops import CudaBackend, rope_table
from nitsum.model.decoder import forward
from nitsum.model.interface import StepInput
from nitsum.model.views import LayerWeights, ModelWeights
from nitsum.shape import Geometry, ModelShape, RopeScaling
from tests.lanes import MemoryPages, Part, compose
from tests.unit.kernels import checks
from tests.unit.kernels.kit import DEVICE, device_sequences, exact, make_step, randn

torch.set_num_threads(1)


class OneRank:
    """Collectives of a lane of one."""

    degree, shard = 1, 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def random_layer(geometry: Geometry, seed: int, normed: bool) -> LayerWeights:
    shape = geometry.shape
    hidden, d, heads = shape.hidden_size, shape.head_dim, geometry.num_kv_heads
    rows = heads * (geometry.q_per_kv + 2) * d

    def weight(*size: int) -> torch.Tensor:
        nonlocal seed
        seed += 1
        return randn(*size, seed=seed) / size[-1] ** 0.5

    norms = (weight(d) + 1, weight(d) + 1) if normed else (None, None)
    return LayerWeights(
        weight(hidden) + 1, weight(rows, hidden), weight(rows), None, None, *norms,
        weight(hidden, heads * geometry.q_per_kv * d), None, weight(hidden) + 1,
        weight(2 * geometry.intermediate_size, hidden), None,
        weight(hidden, geometry.intermediate_size), None,
    )  # fmt: skip


def on_cpu(weights: ModelWeights) -> ModelWeights:
    def moved(value: object) -> object:
        return value.cpu() if isinstance(value, torch.Tensor) else value

    layers = tuple(LayerWeights(**{k: moved(v) for k, v in vars(layer).items()})
                   for layer in weights.layers)  # fmt: skip
    fields = {name: moved(value) for name, value in vars(weights).items()}
    return ModelWeights(**(fields | {"layers": layers}))


@pytest.mark.parametrize("normed", [False, True])
def test_a_prefill_and_a_decode_step_give_the_same_logits(normed: bool) -> None:
    shape = ModelShape("qwen3", 2, 32, 6, 2, 16, 64, 50, 256, rope=RopeScaling(), qk_norm=normed)
    geometry = Geometry(shape, 2)
    layers = tuple(random_layer(geometry, 100 * i, normed) for i in range(2))
    weights = ModelWeights(
        1, 0, randn(50, 32, seed=1), 0, True, layers, randn(32, seed=2), randn(50, 32, seed=3)
    )
    reference = MemoryPages.of(geometry, 1, 8, 4)
    ours = MemoryPages(reference.cache.clone().to(DEVICE))
    steps = [compose([Part([1, 2, 3, 4, 5, 6], 0, [3, 1]), Part([9, 8, 7], 0, [5])], 4),
             compose([Part([11], 6, [3, 1]), Part([12], 3, [5])], 4)]  # fmt: skip
    heads = (geometry.num_kv_heads, geometry.q_per_kv, 16)
    for step in steps:
        expected = forward(geometry, on_cpu(weights), OneRank(), reference, step)
        backend = planned_backend(step, heads, shape)
        inputs = StepInput(
            step.tokens.to(DEVICE), step.positions.to(DEVICE), step.kv_slots.to(DEVICE),
            step.page_table.to(DEVICE), (), step.sample_rows.to(DEVICE),
        )  # fmt: skip
        logits = forward(geometry, weights, OneRank(), ours, inputs, backend)
        exact(logits, expected)
        exact(ours.cache, reference.cache)


def planned_backend(step: StepInput, heads: tuple[int, int, int], shape: ModelShape) -> CudaBackend:
    attention = checks.triton_backend(make_step([(0, 1)] * 2, heads, 4), decode_only=False)
    attention.plan(*device_sequences(step, 0))
    table = rope_table(shape.rope, shape.head_dim, shape.max_positions, torch.float32, DEVICE)
    return CudaBackend(attention, table)
