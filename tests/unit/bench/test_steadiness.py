"""The machine is watched while a benchmark runs, and what is found says how uneven it was."""

import time

from nitsum.bench.steadiness import Steadiness, watched
from nitsum.metrics.percentiles import summarise


def test_pieces_of_work_are_timed_while_the_block_runs():
    with watched() as machine:
        time.sleep(2.0)
    assert machine.pieces_s.num > 0
    assert (machine.pieces_s.p50 or 0) > 0


def test_figures_are_multiples_of_the_usual_time():
    pieces_s = [1e-3] * 995 + [4e-3] * 4 + [9e-3]
    figures = Steadiness(summarise(pieces_s)).figures()
    assert figures["machine_p99_over_p50"] == 1.0
    assert figures["machine_max_over_p50"] == 9.0


def test_nothing_timed_gives_no_figures():
    assert Steadiness().figures() == {}
