"""Which requests run where and in what order. Torch-free."""
