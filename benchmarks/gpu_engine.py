"""`nitsum bench engine --device cuda` for the Llama-3.1-8B shape, without needing its checkpoint.

python -m benchmarks.gpu_engine --out FOLDER [--tp 1,2] [--batches 1,64] [--saturation 512]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.gpu_probe import SHAPE
from nitsum.bench.cuda_engine import Options, measure
from nitsum.bench.provenance import summary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--saturation", type=int, default=0)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--name", default="engine", help="of the file")
    parser.add_argument("--tp", type=numbers, default=(1,))
    parser.add_argument("--batches", type=numbers, default=Options.batches)
    parser.add_argument("--prompts", type=numbers, default=Options.prompts)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE))
    figures: dict[str, float] = {}
    for tp in args.tp:
        options = Options(folder, tp, args.batches, args.prompts, args.saturation, args.context)
        figures |= measure(options, lambda *stage: print(*stage, flush=True), print).figures
        path = args.out / f"{args.name}.json"
        path.write_text(json.dumps(summary(figures), indent=1))
    for name, value in figures.items():
        print(f"{name:45}{value:12.4f}")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    main()
