"""Least slack first, the lost last, tenants in turn; equal to a plain sort at every moment."""

from hypothesis import given
from hypothesis import strategies as st

from nitsum.sched.fairness import Accounts
from nitsum.sched.queue import ReturnQueue, TierQueue
from tests.unit.sched.kit import make_sequence


def drain(queue: TierQueue, now: float) -> list[str]:
    ids = []
    while (head := queue.head(now)) is not None:
        ids.append(head.request_id)
        assert queue.remove(head)
    return ids


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(0, 50)), max_size=40
    ),
    now=st.integers(0, 50),
    gone=st.sets(st.integers(0, 39)),
)
def test_one_tenant_is_a_sort(entries, now, gone):
    queue = TierQueue(Accounts())
    sequences = [
        make_sequence(order=order, latest_start_s=start, lost_after_s=lost, arrival_s=i)
        for i, (order, start, lost) in enumerate(entries)
    ]
    for sequence in sequences:
        queue.add(sequence)
    left = [s for i, s in enumerate(sequences) if i not in gone]
    for sequence in set(sequences) - set(left):
        assert queue.remove(sequence)
    assert len(queue) == len(left)
    ready = [s for s in left if s.lost_after_s >= now]
    late = [s for s in left if s.lost_after_s < now]
    ready.sort(key=lambda s: (s.request.order, s.latest_start_s, s.request.arrival_s))
    late.sort(key=lambda s: (s.request.order, s.request.arrival_s))
    assert drain(queue, now) == [s.request_id for s in ready + late]
    assert queue.accounts.num_waiting == 0


def test_a_lost_request_waits_for_another_tenants_that_can_make_it():
    accounts = Accounts()
    queue = TierQueue(accounts)
    lost = make_sequence(tenant="a", lost_after_s=1.0)
    fine = make_sequence(tenant="b", lost_after_s=9.0)
    queue.add(lost)
    queue.add(fine)
    accounts.charge_prompt("b", 1000)
    assert drain(queue, 5.0) == [fine.request_id, lost.request_id]


def test_the_tenant_with_less_service_is_next():
    accounts = Accounts()
    queue = TierQueue(accounts)
    for tenant in ("a", "a", "b"):
        queue.add(make_sequence(tenant=tenant))
    accounts.charge_prompt("a", 10)
    head = queue.head(0.0)
    assert head is not None
    assert head.request.tenant == "b"


def test_coming_back_to_a_queue_counts_once():
    queue = TierQueue(Accounts())
    sequence = make_sequence()
    queue.add(sequence)
    queue.remove(sequence)
    queue.add(sequence)
    assert drain(queue, 0.0) == [sequence.request_id]


def test_returning_work_keeps_its_place():
    queue = ReturnQueue()
    late, early = make_sequence(arrival_s=5.0), make_sequence(arrival_s=1.0)
    queue.add(late)
    queue.add(early)
    assert queue.head() is early
    assert queue.remove(early)
    assert queue.head() is late
    assert not queue.remove(early)


def test_promises_are_kept_before_best_effort_is_made():
    queue = TierQueue(Accounts())
    other = make_sequence(tenant="a", latest_start_s=1.0)
    promised = make_sequence(tenant="b", latest_start_s=5.0)
    promised.promised = True
    queue.accounts.charge_prompt("b", 100)
    queue.add(other)
    queue.add(promised)
    assert drain(queue, 0.0) == [promised.request_id, other.request_id]


def test_tenants_that_no_longer_matter_are_forgotten():
    accounts = Accounts()
    queue = TierQueue(accounts)
    for i in range(10_000):
        queue.add(make_sequence(tenant=f"tenant-{i}"))
        drain(queue, 0.0)
    assert accounts.num_tenants < 5000
    assert not queue._lines
