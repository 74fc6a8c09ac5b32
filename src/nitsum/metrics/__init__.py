"""What a run was like, from its event stream and nothing else. Torch-free."""
