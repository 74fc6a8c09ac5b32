"""GPUs and machines as plain data: what the vendor promises, not what kernels reach.

Peaks are the vendors' data sheets (dense bf16, one direction of the links); memory is what the
driver reports. What kernels reach of it is measured and kept apart, see `rates.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nitsum.errors import ConfigError
from nitsum.messages import Device
from nitsum.plan import is_power_of_two

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device. Rates are peaks, per second."""

    name: str
    memory_bytes: int
    matmul_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other devices of the node, one direction."""
    host_bytes_per_s: float
    """To host memory, one direction."""
    rates: str
    """The device whose measured rates apply, scaled by the ratio of the peaks."""
    source: str
    driver_name: str = ""
    """What the driver calls it; other variants of the chip have other rates."""


_A100_SHEET = "NVIDIA A100 data sheet (2021), SXM"
_H100_SHEET = "NVIDIA H100 data sheet (2023), SXM"

GPUS = (
    Gpu(
        name="A100-40GB",
        memory_bytes=40_960 * MIB,
        matmul_flops_per_s=312e12,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=300e9,
        host_bytes_per_s=32e9,
        rates="A100-80GB",
        source=_A100_SHEET,
        driver_name="NVIDIA A100-SXM4-40GB",
    ),
    Gpu(
        name="A100-80GB",
        memory_bytes=81_920 * MIB,
        matmul_flops_per_s=312e12,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
        host_bytes_per_s=32e9,
        rates="A100-80GB",
        source=_A100_SHEET,
        driver_name="NVIDIA A100-SXM4-80GB",
    ),
    Gpu(
        name="H100-80GB",
        memory_bytes=81_559 * MIB,
        matmul_flops_per_s=989e12,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        host_bytes_per_s=64e9,
        rates="H100-80GB",
        source=_H100_SHEET,
        driver_name="NVIDIA H100 80GB HBM3",
    ),
    Gpu(
        name="H200-141GB",
        memory_bytes=143_771 * MIB,
        matmul_flops_per_s=989e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        host_bytes_per_s=64e9,
        rates="H100-80GB",
        source="NVIDIA H200 data sheet (2024), SXM",
        driver_name="NVIDIA H200",
    ),
    Gpu(
        name="CPU",
        memory_bytes=4096 * MIB,
        matmul_flops_per_s=100e9,
        memory_bytes_per_s=20e9,
        link_bytes_per_s=10e9,
        host_bytes_per_s=10e9,
        rates="CPU",
        source="one rank on one or two cores of a small server; a rough figure, not a data sheet",
    ),
)

_ALIASES = {"A100": "A100-80GB", "H100": "H100-80GB", "H200": "H200-141GB"}
_MACHINE = re.compile(r"(?:(\d+)x)?(\S+)")


def gpu_named(name: str) -> Gpu:
    """The device of that name, upper or lower case; raises `ConfigError` when unknown."""
    wanted = _ALIASES.get(name.upper(), name).upper()
    for gpu in GPUS:
        if gpu.name.upper() == wanted:
            return gpu
    known = ", ".join((*(gpu.name for gpu in GPUS), *_ALIASES))
    raise ConfigError(f"Unknown GPU {name!r}. Known: {known}.")


def gpu_by_driver(name: str) -> Gpu | None:
    """The device that its driver calls `name`; None for others than these."""
    return next((gpu for gpu in GPUS if name and gpu.driver_name == name), None)


@dataclass(frozen=True)
class Machine:
    """`num_gpus` equal devices that reach each other over their links."""

    gpu: Gpu
    num_gpus: int

    @classmethod
    def parse(cls, text: str) -> Machine:
        """From `8xA100-80GB`, `H200` (one) or `4xCPU`; raises `ConfigError`."""
        match = _MACHINE.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"Cannot read machine {text!r}. Write it like 8xA100-80GB.")
        num_gpus = int(match[1] or 1)
        if not is_power_of_two(num_gpus):
            raise ConfigError(f"Machine {text!r}: the number of GPUs must be a power of two.")
        return cls(gpu_named(match[2]), num_gpus)

    @property
    def device(self) -> Device:
        """What its ranks compute on."""
        return "cpu" if self.gpu == gpu_named("CPU") else "cuda"

    def __str__(self) -> str:
        return f"{self.num_gpus}x{self.gpu.name}"
