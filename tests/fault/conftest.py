from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.model import make_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer and a chat template."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")
