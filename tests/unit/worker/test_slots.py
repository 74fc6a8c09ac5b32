"""Rows and page tables become a step's input; drawn tokens go back into the rows."""

import pytest
import torch

from nitsum.messages import Join, Pages, Work
from nitsum.request import SamplingParams
from nitsum.worker.slots import Slots

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.full((4, 32), 99, dtype=torch.int32)


@pytest.fixture
def slots(rows: torch.Tensor) -> Slots:
    """Slot 1: five prompt tokens, pages [7, 3] on member 0 and [1, 2] on member 1. Slot 3: two."""
    slots = Slots(rows, block_tokens=4)
    slots.join(Join(1, [10, 11, 12, 13, 14], 5, 5, GREEDY))
    slots.join(Join(3, [20, 21], 2, 2, GREEDY))
    slots.set_pages(Pages(1, 0, [[7, 3], [1, 2]]), 0)
    slots.set_pages(Pages(3, 0, [[5], [6]]), 0)
    return slots


def test_a_prefill_and_a_decode_in_one_step(slots: Slots):
    step = slots.step_input([Work(1, 2, 3, False), Work(3, 1, 1, True)])
    assert step.tokens.tolist() == [12, 13, 14, 21]
    assert step.positions.tolist() == [2, 3, 4, 1]
    assert step.kv_slots.tolist() == [7 * 4 + 2, 7 * 4 + 3, 3 * 4 + 0, 5 * 4 + 1]
    assert step.page_table.tolist() == [[7, 3], [5, 0]]
    assert [tuple(span) for span in step.spans] == [(0, 3, 5), (3, 1, 2)]
    assert step.sample_rows.tolist() == [3]
    assert step.tokens.dtype == step.page_table.dtype == step.kv_slots.dtype == torch.int64


def test_each_member_of_a_lane_has_pages_of_its_own(rows: torch.Tensor):
    slots = Slots(rows, block_tokens=4)
    slots.set_pages(Pages(0, 0, [[4, 5], [8, 9]]), 1)
    slots.set_pages(Pages(0, 2, [[6], [2]]), 1)
    assert slots.step_input([Work(0, 0, 12, False)]).page_table.tolist() == [[8, 9, 2]]


def test_older_page_numbers_never_show_behind_a_sequence(slots: Slots):
    """They may lie outside the pages of this lane's view."""
    slots.set_pages(Pages(3, 0, [[1, 1000, 2000]]), 0)
    slots.join(Join(3, [1], 1, 1, GREEDY))
    slots.set_pages(Pages(3, 0, [[2]]), 0)
    table = slots.step_input([Work(1, 4, 1, True), Work(3, 0, 1, True)]).page_table
    assert table.tolist() == [[7, 3], [2, 0]]


def test_drawn_tokens_feed_the_next_step(slots: Slots):
    work = [Work(3, 1, 1, True), Work(1, 0, 2, False), Work(1, 4, 1, True)]
    slots.record(work, [55, 66])
    step = slots.step_input([Work(3, 2, 1, True), Work(1, 5, 1, True)])
    assert step.tokens.tolist() == [55, 66]


def test_what_is_drawn_from(slots: Slots):
    (draw,) = slots.draws([Work(1, 0, 2, False), Work(1, 4, 1, True)])
    assert (draw.row.tolist(), draw.num_prompt, draw.known) == ([10, 11, 12, 13, 14], 5, None)


def test_known_tokens_are_drawn_as_they_are(slots: Slots):
    """Replay: two tokens of the answer are known, the third is to be drawn."""
    slots.join(Join(0, [1, 2, 3, 4], 2, 4, GREEDY))
    draws = slots.draws([Work(0, start, 1, True) for start in (1, 2, 3)])
    assert [draw.known for draw in draws] == [3, 4, None]
    assert [len(draw.row) for draw in draws] == [2, 3, 4]


def test_a_join_without_tokens_leaves_a_row_that_was_moved_in(slots: Slots, rows: torch.Tensor):
    rows[2, :3] = torch.tensor([7, 8, 9])
    slots.join(Join(2, [], 2, 2, GREEDY))
    assert slots.step_input([Work(2, 2, 1, True)]).tokens.tolist() == [9]
