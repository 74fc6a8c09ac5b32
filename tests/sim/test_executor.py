"""Ranks in virtual time: FIFO order, collectives, moves that wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum.clock import VirtualClock
from nitsum.cost.protocol import FixedCost
from nitsum.kv.cache import ArenaShape
from nitsum.messages import Move, MoveDone, Pull, Step, StepDone, StepsTimed, Work
from nitsum.plan import Group
from nitsum.request import Request, SamplingParams
from nitsum.sequence import Sequence
from nitsum.sim.executor import BESIDE_COPIES, SimExecutor, work_shape
from nitsum.step import TIMES_A_REPORT, Chunk, RankTime, batch_shape

ARENA = ArenaShape(num_ranks=2, num_units=64, units_per_block=2, block_tokens=4, unit_bytes=10**8)
TP1_0, TP1_1, TP2 = Group(1, 0), Group(1, 1), Group(2, 0)


def executor(noise: float = 0.0, seed: int = 0, *, copies_beside: bool = False) -> SimExecutor:
    """A token costs a second; 100 MB move in 0.1 s; replies are here at once."""
    return SimExecutor(
        ARENA, FixedCost(0.0, 1.0), VirtualClock(), host_latency_s=0.0, noise=noise, seed=seed,
        copies_beside=copies_beside,
    )  # fmt: skip


def send(target: SimExecutor, step_id: int, group: Group, num_tokens: int) -> None:
    work = [Work(0, 0, num_tokens, True)]
    target.send(group.ranks, Step(step_id, 0, group, [], [], work))


def replies(target: SimExecutor) -> list[tuple[float, object]]:
    """Everything that comes back, with the time at which it does."""
    found: list[tuple[float, object]] = []
    while target.next_reply_s < float("inf"):
        target.clock.advance_to(target.next_reply_s)
        found += [(target.clock.now(), reply) for reply in target.poll(0.0)]
    return found


def test_a_step_waits_for_all_its_ranks():
    target = executor()
    send(target, 1, TP1_0, 1)
    send(target, 2, TP1_1, 3)
    send(target, 3, TP2, 2)
    send(target, 4, TP1_0, 1)
    assert replies(target) == [
        (1.0, StepDone(1, 0, [0], 1.0)),
        (3.0, StepDone(2, 1, [0], 3.0)),
        (5.0, StepDone(3, 0, [0], 4.0, waited_s=2.0)),  # for rank 1
        (6.0, StepDone(4, 0, [0], 1.0)),
    ]
    assert target.busy_s == [4.0, 5.0]


def test_ranks_that_do_not_lead_say_now_and_then_what_steps_took_them():
    target = executor()
    send(target, 0, TP1_0, 2)
    for step_id in range(1, TIMES_A_REPORT + 1):
        send(target, step_id, TP2, 1)
    told = [reply for _, reply in replies(target) if isinstance(reply, StepsTimed)]
    assert [(each.rank, len(each.steps)) for each in told] == [(1, TIMES_A_REPORT)]
    first, second, *_ = told[0].steps
    assert first == RankTime(1, 3.0, 2.0)  # it waits for rank 0
    assert second == RankTime(2, 1.0, 0.0)


def test_a_move_waits_for_the_messages_it_names():
    target = executor()
    send(target, 1, TP1_0, 2)
    after = [(0, target.num_sent(0))]
    send(target, 2, TP1_0, 5)
    target.send([1], Move(7, [Pull(0, [0, 1, 2], [4, 5, 6])], [], after))
    send(target, 3, TP1_1, 1)
    assert [(at_s, type(reply)) for at_s, reply in replies(target)] == [
        (2.0, StepDone),
        (pytest.approx(2.3), MoveDone),
        (pytest.approx(3.3), StepDone),
        (7.0, StepDone),
    ]


def test_a_copy_beside_steps_makes_them_longer_and_others_wait_for_its_end():
    target = executor(copies_beside=True)
    copy = Move(7, [Pull(0, [*range(20)], [*range(20)])], [], [])
    target.send([1], copy)
    after = [(1, target.num_sent(1))]
    send(target, 1, TP1_1, 1)
    target.send([0], Move(8, [Pull(1, [0], [30])], [], after))
    send(target, 2, TP1_1, 4)
    took_s = target.cost.move_time(20 * ARENA.unit_bytes)
    assert 1.0 < took_s < 3.0
    first_s = 1.0 + BESIDE_COPIES
    second_s = first_s + 4.0 + BESIDE_COPIES * (took_s - first_s)
    ends = {r.move_id: at_s for at_s, r in replies(target) if isinstance(r, MoveDone)}
    assert ends[7] == took_s
    assert ends[8] == pytest.approx(took_s + target.cost.move_time(ARENA.unit_bytes))
    assert target.busy_s[1] == pytest.approx(second_s)


def test_host_memory_has_a_price_of_its_own():
    target = executor()
    pull = Pull(0, [0, 1], [4, 5])
    target.send([0], Move(1, [pull], saves=[pull], loads=[pull]))
    [(at_s, reply)] = replies(target)
    assert at_s == pytest.approx(0.2 + 0.4)
    assert isinstance(reply, MoveDone)
    assert reply.bytes == 2 * 10**8


def test_replies_take_the_host_latency_and_nothing_starts_in_the_past():
    target = executor()
    target.host_latency_s = 0.25
    target.clock.advance_to(10.0)
    send(target, 1, TP1_0, 1)
    assert target.poll(0.0) == []
    assert [at_s for at_s, _ in replies(target)] == [11.25]
    send(target, 2, TP1_0, 1)
    assert [at_s for at_s, _ in replies(target)] == [12.5]


def test_a_new_generation_forgets_the_old_one():
    target = executor()
    send(target, 1, TP2, 4)
    assert len(target.start()) == 2
    assert (target.num_sent(0), target.next_reply_s) == (0, float("inf"))


def test_noise_spreads_around_the_prediction():
    target = executor(noise=0.5, seed=3)
    for step_id in range(200):
        send(target, step_id, TP1_0, 1)
    lasts = [reply.seconds for _, reply in replies(target)]
    starts = [0.0]
    for seconds in lasts:
        starts.append(starts[-1] + seconds)
    assert 0.5 <= min(lasts) < 0.6
    assert 1.4 < max(lasts) <= 1.5
    assert starts[-1] == pytest.approx(200, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9), st.booleans()), max_size=8))
def test_a_step_has_the_same_shape_on_either_side(parts):
    sequence = Sequence(Request("r", [1], SamplingParams()))
    chunks = tuple(Chunk(sequence, start, count, samples) for start, count, samples in parts)
    assert work_shape([Work(0, *part) for part in parts]) == batch_shape(chunks)
