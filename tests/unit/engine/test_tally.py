"""What the tally makes of events."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nitsum.config import EngineConfig
from nitsum.engine.tally import GAP_BOUNDS_S, WINDOW_S, Tally, plan_memory_bytes
from nitsum.events import (
    AnyEvent,
    Displaced,
    EventLog,
    Evicted,
    Finished,
    GenerationStarted,
    PlanDecided,
    Promoted,
    RankTimed,
    Refused,
    StepEnded,
    SwitchEnded,
    SwitchStarted,
    WaveCommitted,
    WaveProposed,
    WaveRolledBack,
)
from nitsum.plan import Group, default_plans
from nitsum.shape import ModelShape
from nitsum.snapshot import Restart
from nitsum.step import RankTime

BOTH, FIRST = Group(2, 0), Group(1, 0)


def tally_of(*events: AnyEvent, num_ranks: int = 2) -> Tally:
    tally = Tally(EventLog(), num_ranks, {})
    for event in events:
        tally.emit(event)
    return tally


def step(at_s: float, seconds: float, group: Group = BOTH, **tokens: int) -> StepEnded:
    return StepEnded(
        at_s=at_s, step_id=1, group=group, seconds=seconds, tokens=list(tokens.items())
    )


def proposed(at_s: float, *ids: str) -> WaveProposed:
    return WaveProposed(at_s=at_s, op_id="op", wave=1, request_ids=list(ids), num_units=1)


def committed(at_s: float, *ids: str) -> WaveCommitted:
    return WaveCommitted(at_s=at_s, op_id="op", wave=1, request_ids=list(ids), bytes_moved=1)


def started(at_s: float) -> SwitchStarted:
    return SwitchStarted(at_s=at_s, op_id="op", from_plan="2xTP1", to_plan="TP2", reason="why")


def ended(at_s: float, *, ok: bool = True) -> SwitchEnded:
    return SwitchEnded(
        at_s=at_s,
        op_id="op",
        from_plan="2xTP1",
        to_plan="TP2",
        ok=ok,
        message="" if ok else "no room",
        duration_s=0.25,
        bytes_moved=3 << 20,
        num_left_behind=0,
    )


def test_events_go_on_to_the_next_sink():
    log = EventLog()
    event = step(1.0, 0.1)
    Tally(log, 2, {}).emit(event)
    assert log.events == [event]


def test_it_counts():
    displaced = Displaced(
        at_s=1, request_id="a", tier="flex", by_request_id="b", by_tier="priority", step_id=1
    )
    report = tally_of(
        displaced,
        displaced,
        Promoted(at_s=1, request_id="a", tier="batch", waited_s=9),
        Refused(at_s=1, request_id="c", tier="flex", code="rate_limit_exceeded"),
        Evicted(at_s=1, group=FIRST, num_blocks=3),
        step(1, 0.1, a=2, b=1),
        GenerationStarted(at_s=2, generation=2, num_replayed=4, restart_s=1.5),
    ).report(2)
    assert report.preemptions == [("flex", "priority", 2)]
    assert report.promotions == [("batch", 1)]
    assert report.refusals == [("flex", "rate_limit_exceeded", 1)]
    assert (report.num_evicted_blocks, report.num_output_tokens) == (3, 3)
    assert (report.num_restarts, report.num_replayed, report.last_restart_s) == (1, 4, 1.5)


def test_it_remembers_every_restart():
    def restart(generation: int, restart_s: float) -> GenerationStarted:
        return GenerationStarted(
            at_s=generation, generation=generation, num_replayed=2, restart_s=restart_s
        )

    report = tally_of(restart(2, 0.3), restart(3, 0.3), restart(4, 0.5)).report(5)
    assert report.last_restarts == [Restart(0.3, 2), Restart(0.3, 2), Restart(0.5, 2)]
    assert report.num_restarts == 3


def test_ranks_say_what_they_waited():
    told = RankTimed(at_s=101.0, rank=1, steps=[RankTime(1, 0.5, 0.1), RankTime(2, 0.5, 0.2)])
    tally = tally_of(msgspec.structs.replace(step(100.5, 2.0), waited_s=0.5), told)
    assert tally.report(102.0).rank_waiting_s == pytest.approx([0.5, 0.3])


def test_a_step_keeps_all_its_ranks_busy():
    tally = tally_of(step(100.5, 2.0), step(101.5, 1.0, FIRST))
    assert tally.report(102.0).rank_busy_s == [3.0, 2.0]
    assert tally.report(102.0).rank_busy_ratio == [3.0 / WINDOW_S, 2.0 / WINDOW_S]
    assert tally.report(102.0 + 2 * WINDOW_S).rank_busy_ratio == [0.0, 0.0]


def gaps(*events: AnyEvent) -> list[int]:
    """Indexes of the buckets that have a gap."""
    counts = tally_of(*events).report(9).switch_gaps.counts
    return [index for index, count in enumerate(counts) for _ in range(count)]


def test_a_gap_is_the_longest_from_proposal_to_the_first_token_after_commit():
    found = gaps(
        step(1.0, 0.1, a=1),
        proposed(1.05, "a"),
        step(1.1, 0.1, a=1),
        committed(1.12, "a"),
        step(1.5, 0.1, a=1),
        step(8.0, 0.1, a=1),
    )
    assert found == [GAP_BOUNDS_S.index(0.5)]


@pytest.mark.parametrize(
    "events",
    [
        (committed(1.2, "a"),),  # nobody proposed it
        (proposed(1.1, "b"), committed(1.2, "b")),  # had no token yet
        (
            proposed(1.1, "a"),
            WaveRolledBack(at_s=1.2, op_id="op", wave=1, request_ids=["a"], reason="full"),
        ),
        (
            proposed(1.1, "a"),
            committed(1.2, "a"),
            Finished(
                at_s=1.3, request_id="a", tier="flex", reason="stop", num_output=1, num_cached=0,
                group=None,
            ),
        ),
    ],
)  # fmt: skip
def test_what_is_no_gap(events: tuple[AnyEvent, ...]):
    assert gaps(step(1.0, 0.1, a=1), *events, step(2.0, 0.1, a=1, b=1)) == []


def test_news_are_sentences():
    report = tally_of(started(1.0)).report(1.5)
    assert [one.text for one in report.recent] == ["Going from 2xTP1 to TP2: why."]
    report = tally_of(started(1.0), ended(1.25)).report(2.0)
    assert [(one.kind, one.text) for one in report.recent] == [
        ("switch", "From 2xTP1 to TP2 in 250 ms; 3.0 MiB of KV moved.")
    ]
    report = tally_of(started(1.0), ended(1.25, ok=False)).report(2.0)
    assert [(one.kind, one.text) for one in report.recent] == [
        ("trouble", "Not gone to TP2: no room")
    ]


def test_only_decisions_that_change_something_are_news():
    stays = decided("2xTP1", "2xTP1")
    assert tally_of(stays).report(2).recent == []
    (news,) = tally_of(decided("2xTP1", "TP2")).report(2).recent
    assert (news.kind, news.text) == ("decision", "TP2 instead of 2xTP1: more of them fit")


def decided(plan: str, chosen: str) -> PlanDecided:
    return PlanDecided(
        at_s=1, decision=1, plan=plan, chosen=chosen, reason="more of them fit", trigger="window",
        scores=[], load={}, expected_dwell_s=30,
    )  # fmt: skip


def test_the_same_news_again_are_counted():
    restart = GenerationStarted(at_s=2, generation=2, num_replayed=4, restart_s=1.5)
    recent = tally_of(restart, restart).report(3).recent
    assert [(one.text, one.count) for one in recent] == [
        ("Workers restarted in 1.5 s; 4 request(s) go on.", 2)
    ]


def test_memory_of_plans_is_that_of_their_groups():
    shape = ModelShape(
        family="llama", max_positions=512, num_layers=2, hidden_size=64, num_q_heads=4,
        num_kv_heads=2, head_dim=16,
        intermediate_size=128, vocab_size=256,
    )  # fmt: skip
    sizes = plan_memory_bytes(EngineConfig(model=str(Path()), plans=default_plans(2)), shape)
    assert sizes["2xTP1"] == 0
    assert sizes["TP2"] == sizes["TP2/2xTP1"] > 0
