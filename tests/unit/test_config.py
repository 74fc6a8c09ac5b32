"""What the engine refuses to start with."""

from typing import Any

import pytest

from nitsum.config import EngineConfig
from nitsum.errors import ConfigError
from nitsum.plan import read_plans


def config(*plans: str, **changes: Any) -> EngineConfig:
    return EngineConfig(model="m", plans=read_plans(list(plans), 4), **changes)


def test_ranks_and_widest_degree_come_from_the_plans():
    found = config("4xTP1", "2xTP2")
    assert (found.num_ranks, found.max_tp) == (4, 2)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        config("TP4").seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_lane_narrower_than_the_resident_weights():
    assert config("2xTP2", "TP4", min_tp=2).min_tp == 2
    with pytest.raises(ConfigError, match="TP1 lane, but min_tp is 2"):
        config("2xTP2", "4xTP1", min_tp=2)


@pytest.mark.parametrize("field", ["block_tokens", "max_num_seqs", "max_batch_tokens"])
def test_counts_that_must_be_positive(field: str):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1"):
        config("TP4", **{field: 0})


def test_a_full_decode_batch_must_fit_one_step():
    assert config("TP4", max_num_seqs=64, max_batch_tokens=64)
    with pytest.raises(ConfigError, match="would not fit one step"):
        config("TP4", max_num_seqs=65, max_batch_tokens=64)
