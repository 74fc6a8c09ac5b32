"""What arrives: traces, synthetic streams, mixes of tiers, chains of agent calls. Torch-free."""
