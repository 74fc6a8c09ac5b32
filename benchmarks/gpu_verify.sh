#!/usr/bin/env bash
# `nitsum verify` on two GPUs in bfloat16, on a small random checkpoint of each family: once as it is, and
# once with each fault planted, all at the same time. Usage: gpu_verify.sh OUT [ATTENTION]
set -u
export OMP_NUM_THREADS=4
out=$1; export NITSUM_ATTENTION=${2:-auto}
models=$(mktemp -d)
python3 - "$models" <<'PY'
import sys
from pathlib import Path
from tests.checkpoints import write_checkpoint
for family in ("llama", "qwen2", "qwen3"):
    folder = Path(sys.argv[1]) / family
    folder.mkdir()
    write_checkpoint(folder, family, num_attention_heads=4, num_key_value_heads=2, hidden_size=256,
                     head_dim=64, max_position_embeddings=256)
PY
verify() { # model fault
  python3 -m nitsum.cli verify "$models/$1" --ranks 2 --switches 20 --device cuda --dtype bfloat16 --json \
    ${2:+--inject "$2"} > "$out/verify_$1_${2:-none}.json" 2> "$out/verify_$1_${2:-none}.err"
  echo "$1 ${2:-as it is}: exit $?"
}
for family in llama qwen2 qwen3; do verify $family "" & done
for fault in swap-heads stale-block lost-tail wrong-vocab; do verify llama $fault & done
wait
