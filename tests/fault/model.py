"""What the fault tests serve: a small model, and tiers that a restart does not break."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import write_checkpoint
from tests.server.server_kit import make_checkpoint

PATIENT = """
- {name: priority, level: 0, ttft_s: 600, tpot_s: 60, price: 2}
- {name: default, level: 1, ttft_s: 600, tpot_s: 60}
- {name: flex, level: 2, deadline_s: 6000, price: 0.5}
- {name: batch, level: 3, deadline_s: 6000, price: 0.5, min_share: 0.05}
"""
"""Nothing is refused or served as less."""


def make_model(folder: Path) -> Path:
    """A small random model with a tokenizer and a chat template."""
    write_checkpoint(folder, "llama", vocab_size=512, max_position_embeddings=1024)
    return make_checkpoint(folder)
