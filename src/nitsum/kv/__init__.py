"""KV cache accounting as integers: units, tables, prefixes, moves. Torch-free."""
