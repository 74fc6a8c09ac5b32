"""What the controller decided, over HTTP."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.events import PlanDecided, PlanScored
from nitsum.messages import Decision, Status, encode, from_engine_decoder
from tests.server.server_kit import Bench


def decided(number: int) -> Decision:
    event = PlanDecided(
        at_s=float(number),
        decision=number,
        plan="TP2",
        chosen="TP2",
        reason="there is no other plan",
        trigger="window",
        scores=[PlanScored(plan="TP2", value=1.0, feasible_per_s={"default": 1.0})],
        load={},
        expected_dwell_s=20.0,
        correction={2: 1.1},
    )
    return Decision(event, f"decision {number} in words")


class Deciding(FakeEngineClient):
    """An engine whose controller decided three times."""

    async def status(self, num_decisions: int = 0) -> Status:
        status = await super().status()
        made = [decided(number) for number in (1, 2, 3)]
        status = msgspec.structs.replace(status, decisions=made[3 - min(3, num_decisions) :])
        # As it would cross from the engine's process.
        crossed = from_engine_decoder.decode(encode(status))
        assert isinstance(crossed, Status)
        return crossed


def test_decisions_newest_first_with_words(checkpoint: Path) -> None:
    body = Bench(checkpoint, Deciding()).get("/admin/decisions?limit=2").json()
    assert [entry["decision"] for entry in body["decisions"]] == [3, 2]
    assert body["decisions"][0]["words"] == "decision 3 in words"
    assert body["decisions"][0]["scores"][0]["plan"] == "TP2"


def test_without_a_controller_there_are_none(bench: Bench) -> None:
    assert bench.get("/admin/decisions").json()["decisions"] == []


@pytest.mark.parametrize("limit", ["0", "many", "257"])
def test_a_limit_that_makes_no_sense(bench: Bench, limit: str) -> None:
    response = bench.get(f"/admin/decisions?limit={limit}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "limit"
