"""What a step, a move or a switch will take. Torch-free."""
