"""How much one lane may take on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaneLimits:
    max_num_seqs: int
    """Sequences stepped at once."""
    max_batch_tokens: int
    """Tokens of one step."""
    max_mixed_tokens: int
    """Tokens of one step that has decodes, which its prompts keep waiting."""
