"""Which attention a rank uses."""

from __future__ import annotations

import torch

from nitsum.kernels.attention import AttentionBackend
from nitsum.kernels.triton_attention import TritonAttention
from nitsum.messages import WorkerSpec
from nitsum.model.ops import Heads
from nitsum.shape import Geometry
from nitsum.worker.cuda.lane import MakeAttention


def make_attention(
    geometry: Geometry, degree: int, shard: int, spec: WorkerSpec, device: torch.device
) -> MakeAttention:
    """A maker for one lane's heads."""
    heads = Heads.of(geometry, degree, shard)

    def make(num_seqs: int, decode_only: bool) -> AttentionBackend:
        return TritonAttention(
            num_seqs,
            heads.num_kv,
            heads.q_per_kv,
            heads.head_dim,
            device,
            decode_only=decode_only,
        )

    return make
