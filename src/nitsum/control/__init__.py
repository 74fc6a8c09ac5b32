"""Which plan, when, and the transaction that gets there. Torch-free."""
