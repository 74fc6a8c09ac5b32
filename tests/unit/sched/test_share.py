"""A tier with a guaranteed share gets it, over any long stretch."""

from hypothesis import given
from hypothesis import strategies as st

from nitsum.sched.share import Shares


def all_wait(level: int) -> bool:
    return True


@given(
    share=st.floats(0.01, 0.5),
    high_tokens=st.integers(1, 64),
    low_tokens=st.integers(1, 16),
    quantum=st.integers(4, 200),
)
def test_served_whenever_owed_it_gets_its_share(share, high_tokens, low_tokens, quantum):
    """The low tier is served only in steps in which it is owed or protected."""
    shares = Shares((0.0, share), quantum)
    total = low = 0
    is_running = False
    for _ in range(3000):
        is_running = shares.protects(1) if is_running else shares.owed(all_wait) == 1
        tokens = [high_tokens, low_tokens if is_running else 0]
        shares.note_step(tokens, all_wait)
        total += sum(tokens)
        low += tokens[1]
    # What it may be behind: one quantum not yet due, and what the cap of four quanta cut off.
    possible = low_tokens / (high_tokens + low_tokens)
    assert low >= min(share, possible) * total - 6 * quantum - low_tokens - high_tokens


def test_nothing_is_saved_up_while_idle():
    shares = Shares((0.0, 0.5), 10)
    for _ in range(100):
        shares.note_step((8, 0), (True, False).__getitem__)
    assert shares.owed(all_wait) is None


def test_a_turn_lasts_until_the_credit_is_spent():
    shares = Shares((0.0, 0.5), 10)
    while shares.owed(all_wait) is None:
        shares.note_step((8, 0), all_wait)
    assert shares.protects(1)
    num_steps = 0
    while shares.protects(1):
        shares.note_step((0, 4), all_wait)
        num_steps += 1
    assert num_steps > 2
    assert shares.owed(all_wait) is None
