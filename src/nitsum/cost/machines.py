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


@dataclass(frozen=True)
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
        "A100-40GB",
        40_960 * MIB,
        312e12,
        1.555e12,
        300e9,
        32e9,
        "A100-80GB",
        _A100_SHEET,
        "NVIDIA A100-SXM4-40GB",
    ),
    Gpu(
        "A100-80GB",
        81_920 * MIB,
        312e12,
        2.039e12,
        300e9,
        32e9,
        "A100-80GB",
        _A100_SHEET,
        "NVIDIA A100-SXM4-80GB",
    ),
    Gpu(
        "H100-80GB",
        81_559 * MIB,
        989e12,
        3.35e12,
        450e9,
        64e9,
        "H100-80GB",
        _H100_SHEET,
        "NVIDIA H100 80GB HBM3",
    ),
    Gpu(
        "H200-141GB",
        143_771 * MIB,
        989e12,
        4.8e12,
        450e9,
        64e9,
        "H100-80GB",
        "NVIDIA H200 data sheet (2024), SXM",
        "NVIDIA H200",
    ),
    Gpu(
        "CPU",
        4096 * MIB,
        100e9,
        20e9,
        10e9,
        10e9,
        "CPU",
        "one rank on one or two cores of a small server; a rough figure, not a data sheet",
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
