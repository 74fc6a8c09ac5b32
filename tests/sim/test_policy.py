"""What the scheduler's decisions are for, seen in whole simulated runs."""

from __future__ import annotations

from dataclasses import replace

from nitsum.cost.protocol import FixedCost
from nitsum.events import EventLog, Promoted, Started, StepEnded, StepSent
from nitsum.metrics.records import Recorder
from nitsum.sched.targets import DELIVERY_S
from nitsum.sim.run import Options, simulate
from nitsum.tier import BATCH, DEFAULT, FLEX, PRIORITY
from nitsum.workload.items import WorkItem
from tests.sim.kit import item, small_system

COST = FixedCost(0.02, 1e-4)
"""A step with the prompt tokens that fit into 50 ms beside decodes: 300."""
TIERS = tuple(replace(tier, over_capacity="queue") for tier in (PRIORITY, DEFAULT, FLEX, BATCH))


def run(items: list[WorkItem], tiers=TIERS, **settings) -> tuple[Recorder, EventLog]:
    options = {"cost": COST, "policy": "nitsum", "num_blocks": 8192, "max_batch_tokens": 2048}
    system = small_system("TP2", tiers=tiers, max_num_seqs=64, **{**options, **settings})
    log = EventLog()
    return simulate(system, items, options=Options(drain_s=1e4), sink=log).recorder, log


def starts(log: EventLog) -> dict[str, Started]:
    return {e.request_id: e for e in log.events if isinstance(e, Started)}


def prompts_all_the_time(tier: str, num_tokens: int = 1000, count: int = 40) -> list[WorkItem]:
    """More than the lane gets through."""
    return [item(f"{tier}-{i}", 0.05 * i, num_tokens, 2, tier) for i in range(count)]


def test_short_answers_keep_their_pace_beside_endless_prompts():
    """The first gap counts as much as the others, and the last token has to be here in time."""
    short = [item(f"short-{i}", 0.1 + 0.31 * i, 30, 4 + i % 3, "priority") for i in range(12)]
    items = sorted([*prompts_all_the_time("flex"), *short], key=lambda x: x.at_s)
    recorder, _ = run(items)
    paces = [r.tpot_s for r in recorder.requests.values() if r.tier_asked == "priority"]
    assert all(pace is not None and pace <= PRIORITY.tpot_s for pace in paces)


def test_prompts_leave_answers_the_time_that_their_way_to_the_client_takes():
    """Streams whose pace is all that bounds the prompts beside them are a little ahead of it."""
    pace_s = 0.01
    tiers = tuple(replace(t, tpot_s=pace_s) if t.name == "priority" else t for t in TIERS)
    answers = [item(f"answer-{i}", 0.5 + 1.1 * i, 30, 50, "priority") for i in range(6)]
    items = sorted([*prompts_all_the_time("flex", count=200), *answers], key=lambda x: x.at_s)
    recorder, _ = run(items, tiers, cost=FixedCost(0.004, 5e-5))
    records = (recorder.requests[answer.request_id] for answer in answers)
    early_s = [49 * (pace_s - record.tpot_s) for record in records]
    assert min(early_s) >= DELIVERY_S
    assert max(early_s) < pace_s  # and not much: prompts have the rest


def test_a_prompt_that_comes_during_a_long_step_is_part_of_the_next():
    """300 ms a step: the next one is not sent until shortly before the end of the first."""
    slow = FixedCost(0.3, 0.0)
    items = [item("a", 0.0, 10, 20), item("late", 1.05, 10, 2, "priority")]
    recorder, log = run(items, cost=slow)
    sent = {e.step_id: e.at_s for e in log.events if isinstance(e, StepSent)}
    ended = [e.at_s for e in log.events if isinstance(e, StepEnded)]
    started = starts(log)["late"]
    assert sum(1.05 < at_s <= sent[started.step_id] for at_s in ended) == 0
    assert recorder.requests["late"].ttft_s < 0.3 + 0.3


def test_late_prompts_do_not_make_others_late():
    """A crowd that cannot be served in time comes first; whoever comes later is not held up."""
    crowd = [item(f"crowd-{i}", 0.0, 2000, 2) for i in range(30)]
    later = [item(f"later-{i}", 4.0 + i, 500, 2) for i in range(4)]
    recorder, _ = run([*crowd, *later])
    ttft = {name: r.ttft_s for name, r in recorder.requests.items()}
    assert all(ttft[f"later-{i}"] <= DEFAULT.ttft_s for i in range(4))
    on_time = sum(ttft[f"crowd-{i}"] <= DEFAULT.ttft_s for i in range(30))
    assert on_time >= 6  # 2 s hold seven steps of 2,000 tokens
    assert all(r.outcome == "length" for r in recorder.requests.values())


def test_those_that_hold_up_most_go_back_first():
    """Together they cannot be in time; without the long one, all others can."""
    items = [item("long", 0.0, 16_000, 2), *(item(f"s{i}", 0.01, 1500, 2) for i in range(8))]
    recorder, _ = run(items, max_model_len=20_000)
    late = {n for n, r in recorder.requests.items() if r.ttft_s > DEFAULT.ttft_s}
    assert late == {"long"}


def test_a_prompt_with_a_slot_waits_no_longer_than_its_bound():
    """There are slots for all; what is missing is a part of the steps."""
    tiers = tuple(replace(t, max_wait_s=1.0) if t is TIERS[2] else t for t in TIERS)
    load = [item(f"d{i}", 0.02 * i, 900, 1) for i in range(400)]
    items = sorted([*load, item("patient", 0.5, 200, 2, "flex")], key=lambda x: x.at_s)
    _, log = run(items, tiers)
    promoted = [e for e in log.events if isinstance(e, Promoted)]
    assert "patient" in {e.request_id for e in promoted}
    due_s = 0.5 + 1.0
    late = [e for e in log.events if isinstance(e, StepSent) and due_s < e.at_s]
    assert sum(e.at_s < starts(log)["patient"].at_s for e in late) <= 1


def test_who_is_served_ahead_of_its_turn_takes_a_part_of_a_step_only():
    """A promoted prompt of 50 steps beside decodes must not keep urgent ones from theirs for longer
    than a step without decodes takes."""
    tiers = tuple(replace(t, max_wait_s=0.2) if t is TIERS[2] else t for t in TIERS)
    urgent = [item(f"p{i}", 0.1 * i, 300, 3, "priority") for i in range(60)]
    items = sorted([*urgent, item("flex", 0.01, 15_000, 2, "flex")], key=lambda x: x.at_s)
    recorder, log = run(items, tiers, max_model_len=20_000)
    assert [e.request_id for e in log.events if isinstance(e, Promoted)] == ["flex"]
    ttft = sorted(r.ttft_s for n, r in recorder.requests.items() if n != "flex")
    assert ttft[-1] < 0.5


def test_who_is_late_still_goes_before_lower_tiers():
    """Late priority requests wait for those of their own tier only."""
    crowd = [item(f"p{i}", 0.0, 2000, 2, "priority") for i in range(6)]
    load = [item(f"d{i}", 0.05 * i, 600, 2) for i in range(160)]
    recorder, _ = run(sorted([*crowd, *load], key=lambda x: x.at_s))
    ttft = [r.ttft_s for r in recorder.requests.values() if r.tier_asked == "priority"]
    assert all(seconds is not None and seconds < 4.0 for seconds in ttft)
