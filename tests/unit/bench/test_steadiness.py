"""The machine is watched while a benchmark runs, and what is found says how uneven it was."""

import os
import signal
from multiprocessing import active_children

import pytest

from nitsum.bench.steadiness import Steadiness, watched
from nitsum.metrics.percentiles import summarise


def test_pieces_of_work_are_timed_while_the_block_runs():
    with watched() as machine:
        pass
    assert machine.pieces_s.num > 0
    assert (machine.pieces_s.p50 or 0) > 0
    assert not active_children()


def test_an_interrupt_of_the_terminal_is_not_the_watchers():
    """The benchmark gets it, too, and decides."""
    with watched() as machine:
        for process in active_children():
            os.kill(process.pid or 0, signal.SIGINT)
    assert machine.pieces_s.num > 0


def test_without_its_watcher_a_benchmark_has_no_figure_and_goes_on():
    with watched() as machine:
        _kill_watcher()
    assert machine.figures() == {}


def test_a_dead_watcher_does_not_hide_what_went_wrong():
    with pytest.raises(ValueError, match="the benchmark's own"):
        _fail_without_watcher()


def _fail_without_watcher() -> None:
    with watched():
        _kill_watcher()
        raise ValueError("the benchmark's own")


def _kill_watcher() -> None:
    (process,) = active_children()
    process.kill()
    process.join()


def test_figures_are_multiples_of_the_usual_time():
    pieces_s = [1e-3] * 995 + [4e-3] * 4 + [9e-3]
    figures = Steadiness(summarise(pieces_s)).figures()
    assert figures["machine_p99_over_p50"] == 1.0
    assert figures["machine_max_over_p50"] == 9.0


def test_nothing_timed_gives_no_figures():
    assert Steadiness().figures() == {}
