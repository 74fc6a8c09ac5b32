from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.server.server_kit import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(folder, "llama", vocab_size=512, max_position_embeddings=1024)
    return make_checkpoint(folder)
