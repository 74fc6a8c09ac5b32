"""One process per rank: it holds weights and KV, and runs what it is told."""
