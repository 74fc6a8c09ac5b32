"""How large steps and KV blocks are, and in what they are computed, by kind of device, unless
somebody says otherwise.

One place for the server, its twin in the simulator, plans and benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nitsum.errors import ConfigError
from nitsum.messages import Device, Dtype

DTYPES: dict[Device, Dtype] = {"cpu": "float32", "cuda": "bfloat16"}


@dataclass(frozen=True)
class StepLimits:
    """What one step takes at most, and the tokens of a KV block."""

    block_tokens: int
    max_num_seqs: int
    max_batch_tokens: int
    max_mixed_tokens: int


STEP_LIMITS: dict[Device, StepLimits] = {
    "cpu": StepLimits(16, max_num_seqs=64, max_batch_tokens=512, max_mixed_tokens=512),
    "cuda": StepLimits(32, max_num_seqs=256, max_batch_tokens=2048, max_mixed_tokens=1024),
}
"""On a GPU, steps of up to 2,048 tokens run as graphs: a prompt of 2,000 tokens alone is one step.
The 1,024 of a mixed step take an H100 and an 8B model 20 ms at TP 2 and 30 at TP 1: such a step
makes nobody's gap longer by more, and with 1,536, 64 clients get 3% fewer answers. Blocks of 32
tokens cost kernels what blocks of 16 do, and halve what the engine does at a switch."""


def step_limits(
    device: Device,
    *,
    block_tokens: int = 0,
    max_num_seqs: int = 0,
    max_batch_tokens: int = 0,
    max_mixed_tokens: int = 0,
) -> StepLimits:
    """What was asked for; the device's own where nothing (0) was. Whoever bounds all steps bounds
    those with decodes by the same, unless told otherwise. Raises `ConfigError` for a bound of mixed
    steps that no step may reach."""
    own = STEP_LIMITS[device]
    most = max_batch_tokens or own.max_batch_tokens
    check_mixed_tokens(max_mixed_tokens, most)
    return StepLimits(
        block_tokens=block_tokens or own.block_tokens,
        max_num_seqs=max_num_seqs or own.max_num_seqs,
        max_batch_tokens=most,
        max_mixed_tokens=max_mixed_tokens or max_batch_tokens or own.max_mixed_tokens,
    )


def check_mixed_tokens(max_mixed_tokens: int, max_batch_tokens: int) -> None:
    """Raises `ConfigError` for a bound of mixed steps that is above that of any."""
    if max_mixed_tokens > max_batch_tokens:
        raise ConfigError(
            f"max_mixed_tokens ({max_mixed_tokens}) is above max_batch_tokens "
            f"({max_batch_tokens}), which no step may exceed. Lower it or raise the other."
        )
