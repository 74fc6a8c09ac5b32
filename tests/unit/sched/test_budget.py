"""The largest chunk that fits, found by search over a monotone cost."""

from hypothesis import given
from hypothesis import strategies as st

from nitsum.cost.protocol import FixedCost
from nitsum.plan import Group, Lane
from nitsum.sched.budget import largest_chunk, with_prefill
from nitsum.step import BatchShape

LANE = Lane(Group(1, 0))


@given(
    base_ms=st.integers(0, 50),
    per_token_us=st.integers(0, 500),
    num_decode=st.integers(0, 64),
    start=st.integers(0, 5000),
    num_left=st.integers(0, 4000),
    most=st.integers(0, 2048),
    allowed_ms=st.integers(0, 200),
    near=st.integers(-10, 4100),
)
def test_it_fits_and_one_more_would_not_whatever_was_guessed(
    base_ms, per_token_us, num_decode, start, num_left, most, allowed_ms, near
):
    cost = FixedCost(base_ms / 1e3, per_token_us / 1e6)
    shape = BatchShape(num_decode, 100 * num_decode, 0, 0, num_decode)

    def price(batch: BatchShape) -> float:
        return cost.step_time(LANE, batch)

    def seconds(num_tokens: int) -> float:
        return price(with_prefill(shape, start, num_tokens, num_tokens == num_left))

    found = largest_chunk(price, shape, start, num_left, most, allowed_ms / 1e3, near)
    assert 0 <= found <= min(num_left, most)
    assert found == 0 or seconds(found) <= allowed_ms / 1e3
    assert found == min(num_left, most) or seconds(found + 1) > allowed_ms / 1e3


def test_a_good_guess_saves_looks():
    looks: list[int] = []

    def price(batch: BatchShape) -> float:
        looks.append(batch.prefill_tokens)
        return (0.01 + 1e-5 * batch.prefill_tokens) ** 2

    def num_looks(near: int) -> int:
        looks.clear()
        assert largest_chunk(price, BatchShape(), 0, 4000, 2000, 0.0150001**2, near) == 500
        return len(looks)

    assert num_looks(near=500) < num_looks(near=0)


def test_context_before_the_chunk_is_paid_for():
    near = with_prefill(BatchShape(), 0, 10, True)
    far = with_prefill(BatchShape(), 100, 10, True)
    assert far.prefill_context_tokens - near.prefill_context_tokens == 10 * 100
    assert (far.prefill_tokens, far.num_samples) == (10, 1)
