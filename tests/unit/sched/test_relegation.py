"""Who goes back when not everything can be on time."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from nitsum.sched.relegation import Job, given_up
from tests.unit.sched.kit import make_sequence

jobs_of = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=7).map(
    lambda pairs: [Job(float(due), float(took), make_sequence()) for took, due in pairs]
)


def are_on_time(jobs: list[Job]) -> bool:
    end_s = 0.0
    for job in sorted(jobs, key=lambda job: job.due_s):
        end_s += job.seconds
        if end_s > job.due_s:
            return False
    return True


@given(jobs=jobs_of)
def test_the_rest_is_on_time_and_no_fewer_would_do(jobs):
    back = given_up(jobs, 0.0)
    assert are_on_time([job for job in jobs if job.sequence not in back])
    kept = len(jobs) - len(back)
    assert not any(are_on_time(list(some)) for some in combinations(jobs, kept + 1))


def test_a_job_that_stays_makes_others_go():
    short, chain = make_sequence(), make_sequence()
    jobs = [Job(2.0, 2.0, short), Job(3.0, 2.0, chain, stays=True)]
    assert given_up(jobs, 0.0) == {short}


def test_nobody_goes_back_without_need():
    jobs = [Job(5.0, 1.0, make_sequence()) for _ in range(5)]
    assert given_up(jobs, 0.0) == set()
    assert len(given_up(jobs, 0.5)) == 1
