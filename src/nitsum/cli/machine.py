"""What `nitsum doctor` looks at, and what it makes of it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from nitsum.compiled import core_kind
from nitsum.errors import MissingDependency

PACKAGES = ("torch", "triton", "flashinfer-python", "safetensors", "transformers", "gguf")

MIN_CAPABILITY = 8.0
"""Ampere: the first with bfloat16 in its matrix units."""

_QUERY = "index,name,memory.total,memory.used,compute_cap,driver_version"


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    memory_mib: int
    used_mib: int
    capability: str
    driver: str


@dataclass(frozen=True)
class Machine:
    """Facts only."""

    python: str
    platform: str
    num_cores: int
    packages: dict[str, str | None]
    gpus: tuple[Gpu, ...]
    links: tuple[str, ...]
    """One line for each pair of GPUs: how they are linked."""
    cuda: str | None
    """CUDA version PyTorch was built for; None for a CPU build."""
    gpus_seen_by_torch: int
    unlinked: tuple[tuple[int, int], ...]
    """Pairs of GPUs that cannot map each other's memory."""
    choices: dict[str, str]
    """What is used for what."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Finding:
    kind: Literal["ok", "note", "missing"]
    text: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


Findings = list[Finding]


# --- looking -------------------------------------------------------------------------------------


def inspect_machine() -> Machine:
    """Look at this machine; nothing is imported that is not installed."""
    packages = {name: _version_of(name) for name in PACKAGES}
    gpus = read_gpus(
        _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    )
    cuda, num_seen, unlinked = _ask_torch() if packages["torch"] else (None, 0, ())
    return Machine(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        num_cores=_num_cores(),
        packages=packages,
        gpus=gpus,
        links=read_links(_output("nvidia-smi", "topo", "-m")) if len(gpus) > 1 else (),
        cuda=cuda,
        gpus_seen_by_torch=num_seen,
        unlinked=unlinked,
        choices=choose(packages, num_seen) | {"deciding core": core_kind()},
    )


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout if done.returncode == 0 else ""


def read_gpus(listing: str) -> tuple[Gpu, ...]:
    """From nvidia-smi's CSV, one line a GPU."""
    return tuple(_read_gpu(line) for line in listing.splitlines() if line.count(",") == 5)


def _read_gpu(line: str) -> Gpu:
    index, name, memory, used, capability, driver = (part.strip() for part in line.split(","))
    return Gpu(int(index), name, int(memory), int(used), capability, driver)


def read_links(matrix: str) -> tuple[str, ...]:
    """From the matrix of `nvidia-smi topo -m`: `GPU0 - GPU1: NV18`, each pair once."""
    lines = [line.split() for line in matrix.replace("\x1b[4m", "").splitlines() if line.strip()]
    header = next((line for line in lines if line[0] == "GPU0" and "X" not in line), [])
    names = [name for name in header if name.startswith("GPU") and name[3:].isdigit()]
    rows = {line[0]: line[1:] for line in lines if line[0] in names and "X" in line}
    return tuple(
        f"{one} - {other}: {rows[one][column]}"
        for row, one in enumerate(names)
        for column, other in enumerate(names)
        if row < column and one in rows
    )


def _ask_torch() -> tuple[str | None, int, tuple[tuple[int, int], ...]]:
    import torch

    count = torch.cuda.device_count()
    unlinked = tuple(
        (a, b)
        for a in range(count)
        for b in range(a + 1, count)
        if not torch.cuda.can_device_access_peer(a, b)
    )
    return torch.version.cuda, count, unlinked


# --- judging -------------------------------------------------------------------------------------


def choose(packages: dict[str, str | None], num_gpus: int) -> dict[str, str]:
    """What computes what on this machine."""
    if not packages["torch"]:
        return {"device": "none"}
    if not num_gpus:
        return {"device": "cpu", "attention": "PyTorch", "other kernels": "PyTorch"}
    return {
        "device": "cuda",
        "attention": _attention(packages),
        "other kernels": f"Triton {packages['triton']}",
        "matrix products": "cuBLAS, through PyTorch",
        "all-reduce": "symmetric memory, no multicast" if num_gpus > 1 else "none: one GPU",
    }


def _attention(packages: dict[str, str | None]) -> str:
    """As workers choose it; `NITSUM_ATTENTION` overrides."""
    if not packages["triton"]:
        return "none: Triton is missing"
    try:
        from nitsum.worker.cuda.attention import chosen_library
    except MissingDependency:
        return "none: Triton is installed and cannot be imported"
    names = {
        "triton": f"Triton {packages['triton']}",
        "flash3": "FlashAttention 3",
        "flashinfer": f"FlashInfer {packages['flashinfer-python']}",
    }
    return names[chosen_library()]


def examine(machine: Machine) -> Findings:
    """What is fine, what is worth knowing, what is missing."""
    if not machine.packages["torch"]:
        return [
            Finding(
                "missing",
                "PyTorch is not installed: nothing can be served.",
                "pip install 'nitsum[cpu]' for CPU ranks, 'nitsum[gpu]' for NVIDIA GPUs.",
            )
        ]
    return [*_device_findings(machine), *_package_findings(machine)]


def _device_findings(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding("note", "No NVIDIA GPU was found (nvidia-smi). CPU ranks work: --device cpu.")
        return
    if machine.cuda is None:
        yield Finding(
            "missing",
            "There are GPUs, but PyTorch is a CPU build.",
            "Install PyTorch's CUDA build: pip install torch, from its default Linux index.",
        )
        return
    if machine.gpus_seen_by_torch < len(machine.gpus):
        yield Finding(
            "missing",
            f"PyTorch sees {machine.gpus_seen_by_torch} of {len(machine.gpus)} GPUs.",
            f"Its CUDA is {machine.cuda}; update the driver ({machine.gpus[0].driver}), or look at "
            "CUDA_VISIBLE_DEVICES.",
        )
    for gpu in machine.gpus:
        yield from _gpu_findings(gpu)
    for one, other in machine.unlinked:
        yield Finding(
            "missing",
            f"GPUs {one} and {other} cannot map each other's memory; lanes across them would fail.",
            "Use GPUs that nvidia-smi topo -m shows linked by NVLink, or plans within one GPU.",
        )


def _gpu_findings(gpu: Gpu) -> Iterator[Finding]:
    if float(gpu.capability) < MIN_CAPABILITY:
        yield Finding(
            "missing",
            f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.capability}; bfloat16 needs "
            f"{MIN_CAPABILITY}.",
            "Serve with --dtype float32 there, or on a newer GPU.",
        )
    elif gpu.used_mib > gpu.memory_mib // 20:
        yield Finding(
            "note",
            f"GPU {gpu.index} has {gpu.used_mib:,} MiB in use already; the KV cache will be "
            "smaller by that.",
        )
    else:
        yield Finding("ok", f"GPU {gpu.index} ({gpu.name}) is free and supported.")


def _package_findings(machine: Machine) -> Iterator[Finding]:
    packages = machine.packages
    if not packages["safetensors"]:
        yield Finding(
            "missing", "safetensors is not installed: checkpoints cannot be read.",
            "pip install 'nitsum[cpu]' or 'nitsum[gpu]'.",
        )  # fmt: skip
    if machine.gpus_seen_by_torch and not packages["triton"]:
        yield Finding(
            "missing", "Triton is not installed: GPU ranks cannot run.",
            "It comes with PyTorch's CUDA build; pip install 'nitsum[gpu]' on Linux.",
        )  # fmt: skip
    if not packages["transformers"] or not packages["gguf"]:
        yield Finding(
            "note", "GGUF files and the demo model cannot be converted.",
            "pip install 'nitsum[hf]'.",
        )  # fmt: skip
