"""What only integers decide of a GPU worker: shapes, packing, memory, order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.errors import ConfigError
from nitsum.messages import Join, Move, Pages, Pull, RowPull, Step, Work
from nitsum.plan import Group
from nitsum.request import SamplingParams
from nitsum.shape import Geometry, ModelShape
from nitsum.worker.cuda.buckets import (
    DECODE_SIZES,
    StepShape,
    chunk_shapes,
    chunk_widths,
    decode_shapes,
    decode_sizes,
    padded_draws,
    shape_for,
)
from nitsum.worker.cuda.memory import DeviceMemory, kv_units
from nitsum.worker.cuda.ordering import (
    Precopies,
    concerns_host,
    runs_beside_steps,
    units_of_move,
    units_of_step,
)
from nitsum.worker.cuda.packing import NUM_WORK, pack

# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(1, (1,)), (4, (1, 2, 4)), (5, (1, 2, 4, 5)), (256, (1, 2, 4, 8, 16, 32, 64, 128, 256))],
)
def test_decode_sizes_end_at_the_largest_batch(max_num_seqs: int, sizes: tuple[int, ...]):
    assert decode_sizes(max_num_seqs) == sizes


def decode_of(num_seqs: int) -> list[Work]:
    return [Work(slot, 100, 1, True) for slot in range(num_seqs)]


@given(st.integers(1, 64), st.integers(64, 4096), st.data())
@settings(max_examples=60)
def test_the_chosen_shape_holds_the_step(max_num_seqs: int, max_tokens: int, data: st.DataObject):
    shapes = sorted([*decode_shapes(max_num_seqs), *chunk_shapes(max_num_seqs, max_tokens)])
    num_seqs = data.draw(st.integers(1, max_num_seqs))
    longest = max(1, max_tokens // num_seqs)
    counts = data.draw(st.lists(st.integers(1, longest), min_size=num_seqs, max_size=num_seqs))
    work = [Work(slot, 0, count, slot % 2 == 0) for slot, count in enumerate(counts)]
    shape = shape_for(work, shapes, chunk_widths(max_num_seqs))
    assert shape.num_tokens >= sum(counts)
    assert shape.num_seqs >= num_seqs
    assert shape.is_decode == (set(counts) == {1} and num_seqs == 1)
    if not shape.has_graph:
        assert (shape.num_tokens, shape.is_decode) == (sum(counts), False)
        assert shape.num_seqs in chunk_widths(max_num_seqs)  # kernels are compiled for these
        assert sum(counts) > min(1280, max_tokens // 128 * 128)


def test_decode_takes_the_smallest_graph_and_is_never_a_chunk():
    shapes = sorted([*decode_shapes(256), *chunk_shapes(256, 8192)])
    assert shape_for(decode_of(1), shapes, [8, 256]) == StepShape(1, 1, True, True)
    assert shape_for(decode_of(33), shapes, [8, 256]) == StepShape(64, 64, True, True)
    assert shape_for([*decode_of(33), Work(40, 0, 200, False)], shapes, [8, 256]) == StepShape(
        256, 256, False, True
    )
    assert shape_for([Work(0, 0, 500, True)], shapes, [8, 256]) == StepShape(512, 8, False, True)


@pytest.mark.parametrize("max_tokens", [1024, 1536, 1500, 2048])
def test_full_steps_have_a_graph_of_their_size(max_tokens: int):
    shapes = sorted([*decode_shapes(64), *chunk_shapes(64, max_tokens)])
    full = shape_for([Work(0, 0, max_tokens, True)], shapes, [8, 64])
    assert full == StepShape(max_tokens, 8, False, True)


def test_only_steps_longer_than_all_graphs_have_none():
    shapes = sorted([*decode_shapes(64), *chunk_shapes(64, 8192)])
    assert shape_for([Work(0, 0, 800, True)], shapes, [8, 64]) == StepShape(832, 8, False, True)
    assert shape_for([Work(0, 0, 2049, True)], shapes, [8, 64]) == StepShape(2049, 8, False, False)


# --- packing -------------------------------------------------------------------------------------


def test_a_packed_step_says_all_there_is_to_know():
    joins = [Join(3, [7, 8, 9], 3, 3, SamplingParams()), Join(5, [], 4, 4, SamplingParams())]
    pages = [Pages(3, 0, [[10, 11], [20, 21]]), Pages(5, 2, [[12], [22]])]
    work = [Work(3, 0, 3, True), Work(5, 8, 1, False)]
    packed = pack(Step(1, 1, Group(2, 0), joins, pages, work), member=1, width=4, max_pages=100)
    lines = packed.array[: 4 * NUM_WORK].reshape(4, NUM_WORK)
    assert lines.tolist() == [[3, 0, 3, 1], [5, 8, 1, 0], [-1, 0, 0, 0], [-1, 0, 0, 0]]
    assert packed.array[packed.places].tolist() == [300, 301, 502]
    assert packed.array[packed.values].tolist() == [20, 21, 22]
    assert [(slot, packed.array[part].tolist()) for slot, part in packed.joins] == [(3, [7, 8, 9])]
    assert packed.array.dtype == np.int32


def test_a_decode_step_packs_its_work_and_nothing_else():
    packed = pack(Step(1, 1, Group(1, 0), [], [], decode_of(3)), member=0, width=4, max_pages=9)
    assert len(packed.array) == 4 * NUM_WORK
    assert packed.places.start == packed.places.stop
    assert packed.joins == ()


# --- memory --------------------------------------------------------------------------------------

GEOMETRY = Geometry(ModelShape("llama", 2, 64, 8, 4, 8, 100, 203, 256), max_tp=4)
MIB = 1 << 20


def test_kv_takes_what_is_left_in_whole_blocks():
    memory = DeviceMemory(free_bytes=500 * MIB, total_bytes=1000 * MIB)
    units = kv_units(memory, 100 * MIB, 0.9, GEOMETRY, unit_bytes=MIB)
    assert units == 300  # 500 less the margin of 100 less what is reserved
    assert kv_units(memory, 101 * MIB, 0.9, GEOMETRY, unit_bytes=MIB) == 296
    shared = memory._replace(num_ranks=2)
    assert kv_units(shared, 100 * MIB, 0.9, GEOMETRY, unit_bytes=MIB) == 100


def test_no_room_for_kv_is_said_with_what_to_do():
    memory = DeviceMemory(free_bytes=103 * MIB, total_bytes=1000 * MIB)
    with pytest.raises(ConfigError, match="--min-tp"):
        kv_units(memory, 0, 0.9, GEOMETRY, unit_bytes=MIB)


# --- order ---------------------------------------------------------------------------------------


def test_steps_wait_for_the_precopies_of_units_they_name_and_for_no_others():
    precopies: Precopies[object] = Precopies()
    first, second = object(), object()
    precopies.add([4, 5], first)
    precopies.add([8], second)
    step = Step(1, 1, Group(1, 0), [], [Pages(0, 3, [[2, 9]])], [])
    assert list(units_of_step(step, 0, 2)) == [4, 5, 18, 19]
    assert precopies.touching(units_of_step(step, 0, 2)) == [first]
    assert precopies.touching([8, 4, 5]) == [second, first]
    assert precopies.touching([7]) == []
    precopies.done(first)
    assert precopies.touching([4, 8]) == [second]
    precopies.add([4], first)
    precopies.done(first, second)
    assert precopies.touching([4, 8]) == []


def test_units_copied_twice_are_waited_for_in_their_last_copy():
    precopies: Precopies[object] = Precopies()
    first, second = object(), object()
    precopies.add([1, 2], first)
    precopies.add([2, 3], second)
    precopies.done(first)
    assert precopies.touching([1, 2, 3]) == [second]


def test_only_pulls_from_peers_without_rows_run_beside_steps():
    local, remote = Pull(0, [1], [2]), Pull(1, [5], [6])
    assert runs_beside_steps(Move(1, [local, remote]), 0)
    assert not runs_beside_steps(Move(1, [local]), 0)
    assert not runs_beside_steps(Move(1, [remote], [RowPull(1, 0, 1, 9)]), 0)
    assert list(units_of_move(Move(1, [local, remote]), 0)) == [2, 1, 6]


def test_units_that_are_saved_or_loaded_are_in_use_until_they_are():
    save, load = (
        Move(1, [], saves=[Pull(0, [3, 4], [70, 71])]),
        Move(2, [], loads=[Pull(1, [9], [5])]),
    )
    assert list(units_of_move(save, 0)) == [3, 4]
    assert list(units_of_move(load, 0)) == [5]
    assert concerns_host(save)
    assert concerns_host(load)
    assert not concerns_host(Move(3, [Pull(1, [5], [6])]))


@given(st.integers(0, 512), st.integers(1, 512))
def test_logits_are_computed_for_one_of_a_few_numbers_of_rows(num_draws: int, max_draws: int):
    num_draws = min(num_draws, max_draws)
    size = padded_draws(num_draws, max_draws)
    assert num_draws <= size <= max_draws
    assert size in {0, max_draws, *DECODE_SIZES}
    assert (size == 0) == (num_draws == 0)
