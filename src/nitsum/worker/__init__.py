"""One process per rank: it holds weights and KV, and runs what it is told."""

from nitsum.errors import require_torch

require_torch()
