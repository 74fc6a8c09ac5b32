"""The decoder: Llama, Mistral, Qwen2 and Qwen3, at any degree, on one rank.

Column-parallel projections need no communication; the two row-parallel ones (o and down) end in an
all-reduce. At degree 1 the same code runs and `comm` has nothing to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nitsum.model.interface import Comm, KvPages, StepInput
from nitsum.model.layers import linear
from nitsum.model.ops import Backend, Heads, StepOps
from nitsum.model.torch_ops import TorchOps
from nitsum.model.views import LayerWeights, ModelWeights
from nitsum.shape import Geometry


class Computed(NamedTuple):
    """What a step gives for each of the m positions that a token is drawn from."""

    logits: torch.Tensor
    """[m, vocabulary] float32, without padding, on every rank."""
    hidden: torch.Tensor
    """[m, hidden], normed: what the logits are a product of."""


@torch.inference_mode()
def forward(
    geometry: Geometry,
    weights: ModelWeights,
    comm: Comm,
    kv: KvPages,
    step: StepInput,
    backend: Backend = TorchOps,
) -> torch.Tensor:
    """One step on one rank; the logits of `compute`."""
    return compute(geometry, weights, comm, kv, step, backend).logits


@torch.inference_mode()
def compute(
    geometry: Geometry,
    weights: ModelWeights,
    comm: Comm,
    kv: KvPages,
    step: StepInput,
    backend: Backend = TorchOps,
) -> Computed:
    """One step on one rank.

    Writes the step's k and v into their pages. All ranks of the lane must call this with the same
    tokens and the weights of their own shard at `comm.degree`.
    """
    x = hidden_states(geometry, weights, comm, kv, step, backend)[step.sample_rows]
    return Computed(compute_logits(geometry, weights, comm, x), x)


@torch.inference_mode()
def hidden_states(
    geometry: Geometry,
    weights: ModelWeights,
    comm: Comm,
    kv: KvPages,
    step: StepInput,
    backend: Backend,
) -> torch.Tensor:
    """All but the last product: [n, hidden], normed. See `compute`."""
    assert (weights.degree, weights.shard) == (comm.degree, comm.shard), "weights of another shard"
    heads = Heads.of(geometry, weights.degree, weights.shard)
    ops = backend(geometry.shape, heads, weights.embedding.dtype, kv, step)
    hidden = embed(weights, comm, step.tokens)
    x = ops.rms_norm(hidden, weights.layers[0].input_norm)
    next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]
    for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
        part = attention(ops, comm, index, layer, x)
        x = ops.reduce_add_rms_norm(comm, part, hidden, layer.post_norm)
        part = mlp(ops, comm, geometry.max_tp // weights.degree, layer, x)
        x = ops.reduce_add_rms_norm(comm, part, hidden, next_norm)
    return x


def embed(weights: ModelWeights, comm: Comm, tokens: torch.Tensor) -> torch.Tensor:
    """[n] -> [n, hidden], memory of its own (the residual stream is updated in place)."""
    if weights.holds_all_tokens:
        return F.embedding(tokens, weights.embedding)
    local = tokens - weights.first_token
    elsewhere = (local < 0) | (local >= weights.embedding.shape[0])
    rows = F.embedding(local.masked_fill(elsewhere, 0), weights.embedding)
    # The sum may live in a buffer that the next all-reduce overwrites.
    return comm.all_reduce(rows.masked_fill_(elsewhere[:, None], 0)).clone()


def attention(
    ops: StepOps, comm: Comm, index: int, layer: LayerWeights, x: torch.Tensor
) -> torch.Tensor:
    """[n, hidden] -> this rank's part of [n, hidden]."""
    qkv = linear(x, layer.qkv)
    kv = None if layer.kv is None else linear(x, layer.kv)
    out = ops.attend(index, ops.split_rope_write(index, layer, qkv, kv))
    return row_parallel(comm, out, layer.o, layer.o_bias)


def mlp(
    ops: StepOps, comm: Comm, num_chunks: int, layer: LayerWeights, x: torch.Tensor
) -> torch.Tensor:
    """[n, hidden] -> this rank's part of [n, hidden]."""
    gate_up = linear(x, layer.gate_up, layer.gate_up_bias)
    return row_parallel(comm, ops.silu_mul(gate_up, num_chunks), layer.down, layer.down_bias)


def row_parallel(
    comm: Comm, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each rank's part of a product; the bias enters the sum once."""
    return linear(x, weight, bias if comm.shard == 0 else None)


def compute_logits(
    geometry: Geometry, weights: ModelWeights, comm: Comm, x: torch.Tensor
) -> torch.Tensor:
    """[m, hidden] -> [m, vocabulary] float32; a step that samples nothing gathers nothing."""
    if not x.shape[0]:
        return x.new_empty(0, geometry.shape.vocab_size, dtype=torch.float32)
    logits = linear(x, weights.lm_head)
    if comm.degree > 1:
        logits = comm.gather_vocab(logits)
    return logits[:, : geometry.shape.vocab_size].float()
