"""One process that decides: lane loops, switching, KV accounting. Torch-free."""
