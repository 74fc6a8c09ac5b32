"""What kernels reach on a device: fitted constants, kept as data with their source.

One JSON file a device under `data/`. `calibrate.py` writes them.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files

import msgspec

from nitsum.cost.curve import Curve
from nitsum.cost.machines import Gpu, gpu_named
from nitsum.errors import ConfigError


class GemmRate(msgspec.Struct, frozen=True):
    """`x[m, k] @ w[n, k].T` takes launch + k * tail + p-norm(bytes / B, FLOPs / F).

    The p-norm is a maximum with a round corner: near the ridge a GEMM is bound by both.
    """

    launch_s: float
    tail_s: float
    """Per column of `w`: a thread block's walk along k, which no parallelism shortens."""
    bytes_per_s: float
    flops_per_s: float
    sharpness: float
    """p of the norm; infinite would be a plain maximum."""

    def seconds(self, m: int, n: int, k: int, dtype_bytes: int) -> float:
        p = self.sharpness
        memory = dtype_bytes * (n * k + m * (n + k)) / self.bytes_per_s
        compute = 2.0 * m * n * k / self.flops_per_s
        return self.launch_s + k * self.tail_s + (memory**p + compute**p) ** (1.0 / p)


class LinearRate(msgspec.Struct, frozen=True):
    """Something that takes `launch_s` and then moves `bytes_per_s`."""

    launch_s: float
    bytes_per_s: float
    measured: bool = True
    """False: derived from a neighbour by rule, not from a measurement of its own."""

    def seconds(self, num_bytes: float) -> float:
        return self.launch_s + num_bytes / self.bytes_per_s


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """All constants of one device."""

    gpu: str
    source: list[str]
    """Where each group of constants comes from."""
    gemm: GemmRate
    elementwise: LinearRate
    """Norms, rotary embedding, activation: one launch each, bytes in and out."""
    all_reduce: dict[int, Curve]
    """By degree; bytes are those of the reduced tensor."""
    attention_launch_s: float
    """Per layer."""
    attention_bytes_per_s: float
    """Reading KV in decode."""
    attention_flops_per_s: float
    """Prefill."""
    step_s: float
    """Per step: launch of the graph, sampling, tokens to the host."""
    move: LinearRate
    """Pulling KV out of a peer's memory."""
    offload: LinearRate
    """Copying KV to or from host memory."""


_LATENCY_PER_DOUBLING = 1.25
"""Assumed growth of an all-reduce's latency where no wider group was measured."""


def all_reduce_curve(rates: Rates, degree: int) -> Curve:
    """The measured curve at `degree`, or one derived from the widest measured below it.

    Bandwidth follows the bytes each rank sends, 2 (t - 1) / t of the tensor; latency grows by a
    quarter per doubling. Raises `ConfigError` when nothing narrower was measured.
    """
    if degree in rates.all_reduce:
        return rates.all_reduce[degree]
    narrower = [known for known in rates.all_reduce if known < degree]
    if not narrower:
        raise ConfigError(f"{rates.gpu}: no all-reduce times to derive those at TP{degree} from.")
    known = max(narrower)
    bytes_ratio = (1 - 1 / degree) / (1 - 1 / known)
    latency_ratio = _LATENCY_PER_DOUBLING ** math.log2(degree / known)
    knots = rates.all_reduce[known].knots
    latency = knots[0][1]
    return Curve(
        [(x, latency * latency_ratio + (y - latency) * bytes_ratio) for x, y in knots], False
    )


@cache
def rates_for(gpu: Gpu) -> Rates:
    """The device's own constants, or its sibling's scaled by the ratio of the peaks."""
    measured = load_rates(gpu.rates)
    return measured if gpu.name == gpu.rates else _scaled(measured, gpu_named(gpu.rates), gpu)


def load_rates(name: str) -> Rates:
    """Read `data/<name>.json`; raises `ConfigError` when there is none."""
    path = files("nitsum.cost") / "data" / f"{name.lower()}.json"
    if not path.is_file():
        raise ConfigError(f"No rates for {name}; run python -m nitsum.cost.calibrate --gpu {name}.")
    return msgspec.json.decode(path.read_bytes(), type=Rates)


def _scaled(rates: Rates, old: Gpu, new: Gpu) -> Rates:
    flops = new.matmul_flops_per_s / old.matmul_flops_per_s
    memory = new.memory_bytes_per_s / old.memory_bytes_per_s
    gemm, elementwise = rates.gemm, rates.elementwise
    return msgspec.structs.replace(
        rates,
        gpu=new.name,
        source=[*rates.source, f"all scaled from {old.name} by the ratio of the peaks"],
        gemm=msgspec.structs.replace(
            gemm, bytes_per_s=gemm.bytes_per_s * memory, flops_per_s=gemm.flops_per_s * flops
        ),
        elementwise=LinearRate(elementwise.launch_s, elementwise.bytes_per_s * memory, False),
        attention_bytes_per_s=rates.attention_bytes_per_s * memory,
        attention_flops_per_s=rates.attention_flops_per_s * flops,
    )
