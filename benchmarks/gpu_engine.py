"""`nitsum bench engine --device cuda` for the Llama-3.1-8B shape, without needing its checkpoint.

python benchmarks/gpu_engine.py --out FOLDER [--saturation 512]
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
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE))
    options = Options(folder, saturation=args.saturation)
    result = measure(options, lambda what, done, count: print(what, done, count, flush=True), print)
    for name, value in result.figures.items():
        print(f"{name:45}{value:12.4f}")
    path = args.out / "engine.json"
    path.write_text(json.dumps(summary(result.figures), indent=1))


if __name__ == "__main__":
    main()
