"""Promises hold: whatever was promised is in time on a lane that keeps to the cost model."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from nitsum.cost.protocol import FixedCost
from nitsum.plan import Group, Lane
from nitsum.sched.limits import LaneLimits
from nitsum.sched.promise import Promises
from nitsum.sequence import Sequence
from nitsum.step import BatchShape
from nitsum.tier import DEFAULT_TIERS, Tier
from tests.unit.sched.kit import make_sequence

LANE = Lane(Group(1, 0))
PRIORITY, DEFAULT = DEFAULT_TIERS[:2]
COST = FixedCost(0.005, 1e-4)


def make_promises(max_num_seqs: int = 64, capacity_tokens: int = 100_000) -> Promises:
    limits = LaneLimits(max_num_seqs, 512, 512)
    return Promises(LANE, DEFAULT_TIERS, COST, limits, capacity_tokens)


@dataclass
class Job:
    sequence: Sequence
    tier: Tier
    due_s: float
    periods_left: int
    answer_left: int
    is_passed: bool = False
    """A higher tier came after it."""


arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # periods since the one before
        st.floats(0.0, 0.99),  # part of a period it arrives before the next begins
        st.sampled_from([PRIORITY, DEFAULT]),
        st.integers(1, 800),  # prompt
        st.integers(1, 60),  # answer
    ),
    max_size=60,
)


@given(arrivals=arrivals)
def test_every_promise_is_kept_unless_a_higher_tier_comes(arrivals):
    """The lane computes one chunk a period, higher tiers and earlier deadlines first, while all
    promised requests that are through decode beside it."""
    promises = make_promises()
    period_s = promises.period_s
    now, prefilling, decoding = 0.0, [], []
    queue = list(arrivals)
    while queue or prefilling:
        if queue:
            gap, part, tier, num_prompt, num_answer = queue.pop(0)
            for _ in range(gap):
                now = run_period(promises, prefilling, decoding, now, period_s)
            slack_s = tier.ttft_s
            if promises.can(tier, num_prompt, num_prompt + num_answer, slack_s):
                sequence = make_sequence(num_prompt, tier=tier.name)
                promises.add(sequence, tier, num_prompt, num_prompt + num_answer)
                for job in prefilling:
                    job.is_passed |= job.tier.level > tier.level
                periods = round(promises.through_s(num_prompt) / period_s)
                due_s = now - part * period_s + slack_s
                prefilling.append(Job(sequence, tier, due_s, periods, num_answer))
        else:
            now = run_period(promises, prefilling, decoding, now, period_s)


def run_period(promises, prefilling, decoding, now, period_s) -> float:
    check_decodes(promises, decoding)
    for job in list(decoding):
        job.answer_left -= 1
        if not job.answer_left:
            decoding.remove(job)
            promises.remove(job.sequence)
    now += period_s
    if prefilling:
        job = min(prefilling, key=lambda job: (job.tier.level, job.due_s))
        job.periods_left -= 1
        if not job.periods_left:
            in_time = now <= job.due_s + 1e-9
            assert in_time or job.is_passed, f"{job.tier.name} was promised {job.due_s}, is {now}"
            prefilling.remove(job)
            promises.prefilled(job.sequence)
            decoding.append(job)
    return now


def check_decodes(promises, decoding) -> None:
    """A step with all decodes and one chunk takes no longer than the tightest TPOT."""
    shape = BatchShape(len(decoding), 0, promises._chunk_tokens(), 0, len(decoding) + 1)
    assert COST.step_time(LANE, shape) <= promises.period_s


def test_no_more_than_slots_and_memory():
    promises = make_promises(max_num_seqs=4, capacity_tokens=1000)
    for _ in range(4):
        assert promises.can(PRIORITY, 8, 100, 0.3)
        promises.add(make_sequence(), PRIORITY, 8, 100)
        for pending in list(promises._held):
            promises.prefilled(pending)
    assert not promises.can(PRIORITY, 8, 100, 0.3)
    assert not make_promises(capacity_tokens=1000).can(PRIORITY, 8, 1001, 0.3)


def test_lower_tiers_leave_room_for_those_above():
    promises = make_promises(max_num_seqs=8)
    count = 0
    while promises.can(DEFAULT, 8, 20, 2.0):
        sequence = make_sequence()
        promises.add(sequence, DEFAULT, 8, 20)
        promises.prefilled(sequence)
        count += 1
    assert count == 6
    assert promises.can(PRIORITY, 8, 20, 0.3)


def test_a_higher_tier_is_promised_whatever_lower_ones_were():
    promises = make_promises()
    long = promises._chunk_tokens() * 38
    assert promises.can(DEFAULT, long, long, 2.0)
    promises.add(make_sequence(), DEFAULT, long, long)
    assert promises.can(PRIORITY, promises._chunk_tokens() * 2, 400, 0.3)
    promises.add(make_sequence(), PRIORITY, promises._chunk_tokens() * 2, 400)
    assert not promises.can(DEFAULT, 8, 20, 2.0), "its prompts are behind both"


def test_what_is_over_no_longer_counts():
    promises = make_promises(max_num_seqs=1)
    sequence = make_sequence()
    promises.add(sequence, PRIORITY, 8, 20)
    assert not promises.can(PRIORITY, 8, 20, 0.3)
    promises.remove(sequence)
    assert promises.can(PRIORITY, 8, 20, 0.3)
    assert (promises.num_promised, promises.num_tokens) == (0, 0)


def test_a_machine_that_is_too_slow_could_not_even_when_idle():
    slow = Promises(LANE, DEFAULT_TIERS, FixedCost(0.2, 1e-3), LaneLimits(8, 512, 512), 1000)
    assert not slow.could(PRIORITY, 8, 20, 0.3)
    assert make_promises().could(PRIORITY, 8, 20, 0.3)


def test_late_prompts_are_before_lower_tiers_and_behind_their_own_until_they_are_through():
    promises = make_promises()
    chunk = promises._chunk_tokens()
    late = make_sequence()
    assert not promises.can(PRIORITY, 8 * chunk, 20, 0.3)
    assert promises.can_late(PRIORITY, 8 * chunk, 20, 0.3)
    promises.add_late(late, PRIORITY, 8 * chunk, 20)
    assert promises.can(PRIORITY, chunk, 20, 0.3), "it does not wait behind a late one"
    assert promises.can_late(PRIORITY, 13 * chunk, 20, 0.3)
    assert not promises.can_late(PRIORITY, 15 * chunk, 20, 0.3), "of 24 periods, 2 are under way"
    assert promises.can(DEFAULT, 29 * chunk, 20, 2.0)
    assert not promises.can(DEFAULT, 31 * chunk, 20, 2.0)
    promises.prefilled(late)
    assert promises.can_late(PRIORITY, 21 * chunk, 20, 0.3)
    assert promises.can(DEFAULT, 37 * chunk, 20, 2.0)
    assert promises.num_promised == 1, "its answer has its place among the decodes"
    promises.remove(late)
    assert promises.num_promised == 0


def test_a_prefill_lane_counts_late_prompts_as_under_way():
    limits = LaneLimits(64, 512, 512)
    lane = Lane(Group(1, 0), "prefill")
    promises = Promises(lane, DEFAULT_TIERS, COST, limits, 100_000)
    assert promises.can(PRIORITY, 500, 500, 0.1)
    promises.add_late(make_sequence(), PRIORITY, 2000, 2000)
    assert not promises.can(PRIORITY, 500, 500, 0.1)
