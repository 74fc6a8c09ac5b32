from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.server_kit import Bench, make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def bench(checkpoint: Path) -> Bench:
    return Bench(checkpoint)
