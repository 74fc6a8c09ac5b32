"""Virtual token counters: the gap between tenants that both wait stays within the proof's bound."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.sched.fairness import ANSWER_WEIGHT, PROMPT_WEIGHT, Accounts
from nitsum.sched.queue import TierQueue
from tests.unit.sched.kit import make_sequence

LONGEST_PROMPT = 200
LONGEST_ANSWER = 60
TENANTS = ("a", "b", "c")

request_sizes = st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_ANSWER))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.lists(request_sizes, min_size=1, max_size=5), min_size=3, max_size=3),
    num_slots=st.integers(1, 4),
    num_steps=st.integers(50, 400),
)
def test_gap_between_backlogged_tenants_is_bounded(sizes, num_slots, num_steps):
    """Every tenant always waits, each with its own mix; a batch holds `num_slots` requests."""
    accounts = Accounts()
    queue = TierQueue(accounts)
    served = dict.fromkeys(TENANTS, 0.0)
    sequences = {}

    def submit(tenant: str, index: int) -> None:
        mix = sizes[TENANTS.index(tenant)]
        num_prompt, num_answer = mix[index % len(mix)]
        sequence = make_sequence(num_prompt, tenant=tenant, max_tokens=num_answer)
        sequences[sequence] = num_answer
        queue.add(sequence)

    for tenant in TENANTS:
        for index in range(3):
            submit(tenant, index)
    running = {}
    bound = 2 * max(
        PROMPT_WEIGHT * LONGEST_PROMPT,
        ANSWER_WEIGHT * num_slots * (LONGEST_PROMPT + LONGEST_ANSWER),
    )
    for step in range(num_steps):
        while len(running) < num_slots:
            head = queue.head(0.0)
            assert head is not None
            tenant = head.request.tenant
            queue.remove(head)
            submit(tenant, step)
            accounts.charge_prompt(tenant, head.num_prompt)
            served[tenant] += PROMPT_WEIGHT * head.num_prompt
            running[head] = sequences[head]
        for sequence in list(running):
            tenant = sequence.request.tenant
            accounts.charge_token(tenant)
            served[tenant] += ANSWER_WEIGHT
            running[sequence] -= 1
            if not running[sequence]:
                del running[sequence]
        assert max(served.values()) - min(served.values()) <= bound


def test_idleness_earns_no_credit():
    accounts = Accounts()
    busy, idle = accounts["busy"], accounts["idle"]
    accounts.enter(busy, 1)
    accounts.charge_prompt("busy", 5000)
    accounts.enter(idle, 1)
    assert idle.served == busy.served


def test_who_comes_when_nobody_waits_starts_where_the_last_left():
    accounts = Accounts()
    accounts.enter(accounts["first"], 1)
    accounts.charge_prompt("first", 70)
    accounts.leave(accounts["first"], 1)
    accounts.enter(accounts["second"], 1)
    assert accounts["second"].served == 70


def test_new_queues_keep_what_was_served():
    accounts = Accounts()
    accounts.enter(accounts["a"], 9)
    accounts.charge_prompt("a", 70)
    accounts.forget_waiting()
    assert (accounts.num_waiting, accounts.num_waiting_tokens) == (0, 0)
    assert accounts["a"].served == 70
