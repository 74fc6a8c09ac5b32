"""Times every kernel against the bytes or operations it cannot avoid; needs one CUDA device.

    python -m benchmarks.kernels --out DIR [--only decode,chunk] [--warm]

Times are medians of replayed CUDA graphs over rotating inputs, too many for the L2 cache to hold.
Floors use the copy and matmul rates measured in the same run. Writes DIR/summary.json. `--warm`
compiles and runs everything once, without timing: several such processes compile in parallel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.kernels.attention import bench_chunk, bench_decode
from benchmarks.kernels.layer import bench_layer, bench_prepare
from benchmarks.kernels.sampling import bench_gather, bench_sampling
from benchmarks.kernels.timing import Report, measure_ceilings

SECTIONS: dict[str, Callable[[Report], None]] = {
    "layer": bench_layer,
    "prepare": bench_prepare,
    "sampling": bench_sampling,
    "gather": bench_gather,
    "chunk": bench_chunk,
    "decode": bench_decode,
}


def summary(report: Report) -> dict[str, object]:
    import triton  # pyright: ignore[reportMissingImports]

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.kernels", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "triton": triton.__version__,
                     "cuda": torch.version.cuda},
        "hardware": torch.cuda.get_device_name(),
        "notes": "Medians of replayed CUDA graphs; floors from rates measured in the same run.",
        "figures": report.figures,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.warm)
    if not arguments.warm:
        measure_ceilings(report)
    for name in arguments.only.split(","):
        SECTIONS[name](report)
        torch.cuda.empty_cache()
        if arguments.out and not arguments.warm:
            arguments.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(summary(report), indent=1)
            (arguments.out / "summary.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
