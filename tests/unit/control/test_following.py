"""Which lane cached prefixes follow to at a switch, and what of them arrives."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from nitsum.control.courier import Courier
from nitsum.control.following import Following
from nitsum.kv.prefix import hash_prompt
from nitsum.kv.transfer import Transfer
from nitsum.plan import Group, read_plans
from tests.unit.control.withholding import Withholding
from tests.unit.engine.machine import BLOCK_TOKENS, Machine

Prompt = list[int]


def cached(prompts: list[Prompt], num_ranks: int = 2, num_blocks: int = 250) -> Machine:
    """One wide lane that nobody uses any more, and what it cached."""
    plans = read_plans([f"TP{num_ranks}", f"{num_ranks}xTP1"], num_ranks)
    machine = Machine(
        num_ranks,
        units_per_block=num_ranks,
        num_blocks=num_blocks,
        plans=plans,
        max_num_seqs=16,
        max_batch_tokens=64,
        precopy_units=24,
    )
    for prompt in prompts:
        machine.submit(prompt, max_tokens=2)
    machine.drain()
    return machine


def split(machine: Machine) -> list[set[int]]:
    """Hashes that each lane has after a switch to a lane a rank."""
    num_ranks = machine.config.num_ranks
    machine.switch(f"{num_ranks}xTP1")
    machine.drain()
    prefixes = machine.core.generation.kv.prefixes
    return [set(prefixes.in_layout(Group(1, rank))) for rank in range(num_ranks)]


def conversations(system: Prompt, count: int, num_blocks: int, random: Random) -> list[Prompt]:
    """Prompts that begin alike, and then differ in what they say and in how long it is."""
    sizes = [random.randint(1, 2 * num_blocks - 1) for _ in range(count)]
    return [
        system + [1000 * (i + 1) + t for t in range(BLOCK_TOKENS * size)]
        for i, size in enumerate(sizes)
    ]


def whole_in(lanes: list[set[int]], prompt: Prompt) -> list[int]:
    """Lanes that have all of a prompt."""
    hashes = set(hash_prompt(prompt, BLOCK_TOKENS))
    return [index for index, found in enumerate(lanes) if hashes <= found]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("system_blocks", [0, 1, 3])
def test_conversations_with_a_common_system_prompt_are_shared_out_among_the_lanes(
    seed: int, num_ranks: int, system_blocks: int
):
    system = list(range(BLOCK_TOKENS * system_blocks))
    prompts = conversations(system, 24, 6, Random(seed))
    lanes = split(cached(prompts, num_ranks))
    assert all(len(whole_in(lanes, prompt)) == 1 for prompt in prompts)
    sizes = [len(found) for found in lanes]
    longest = max(map(len, prompts)) // BLOCK_TOKENS
    assert max(sizes) - min(sizes) <= longest, sizes


def test_two_families_below_a_common_beginning_are_split_where_each_of_them_goes_apart():
    """The first block is everybody's, the next ones one of two instructions."""
    random = Random(0)
    families = [conversations([*range(4), *([7 + i] * 8)], 12, 6, random) for i in range(2)]
    lanes = split(cached([prompt for pair in zip(*families, strict=True) for prompt in pair]))
    for prompts in families:
        places = [whole_in(lanes, prompt) for prompt in prompts]
        assert all(places)
        assert {place[0] for place in places} == {0, 1}


def test_what_goes_on_from_a_long_prefix_stays_with_it():
    """An answer asked for again and again: a copy of all before it would cost more than it is
    worth."""
    documents = [[100 * i + t for t in range(120)] for i in range(1, 5)]
    tails = [[5000 + i] * 8 for i in range(4)]
    lanes = split(cached([document + tail for document in documents for tail in tails]))
    for document in documents:
        places = [whole_in(lanes, document + tail) for tail in tails]
        assert len(set(map(tuple, places))) == 1
        assert len(places[0]) == 1


def test_lanes_of_the_same_size_come_together_again():
    """There and back: what two lanes have of one family is one family."""
    prompts = conversations(list(range(8)), 24, 6, Random(1))
    machine = cached(prompts)
    for _ in range(2):
        lanes = split(machine)
        sizes = [len(found) for found in lanes]
        assert max(sizes) - min(sizes) <= 12, sizes
        machine.switch("TP2")
        machine.drain()
    prefixes = machine.core.generation.kv.prefixes
    wide = [set(prefixes.in_layout(Group(2, 0)))]
    assert all(whole_in(wide, prompt) for prompt in prompts)


# --- when a lane has no memory --------------------------------------------------------------------

SOURCE, FIRST, SECOND = Group(2, 0), Group(1, 0), Group(1, 1)


class FullLane:
    """A wide lane's prefixes on their way to two lanes, the second of which has no free memory."""

    def __init__(self) -> None:
        system = list(range(8))
        self.common = set(hash_prompt(system, BLOCK_TOKENS))
        prompts = conversations(system, 6, 6, Random(0))
        self.hashes = {h for prompt in prompts for h in hash_prompt(prompt, BLOCK_TOKENS)}
        self.machine = cached(prompts)
        generation = self.machine.core.generation
        self.kv, self.mover = generation.kv, Withholding()
        self.courier, self.num_arrived = Courier(self.mover, 1000), 0
        plan = self.machine.plans["2xTP1"]
        self.following = Following(generation, self.courier, number=1, sources=[SOURCE], plan=plan)
        pool, order = self.kv.pools[1], self.kv.arena.page_order(SECOND)
        self.taken = pool.alloc_many(order, pool.num_pages(order)) or []

    def give_memory(self) -> None:
        """The second lane has some now."""
        order = self.kv.arena.page_order(SECOND)
        for start in self.taken:
            self.kv.pools[1].release(start, 1 << order)
        self.taken = []

    def follow(self, until: Callable[[], bool]) -> None:
        """Turns in which all that was sent arrives."""
        for _ in range(100):
            if until() or not self.following.advance(32):
                return
            for move_id in range(self.num_arrived + 1, len(self.mover.sent) + 1):
                self.courier.acknowledge(move_id, 0)
            self.num_arrived = len(self.mover.sent)
            self.courier.let_go(100)
        raise AssertionError("following does not end")

    def in_layout(self, group: Group) -> set[int]:
        return set(self.kv.prefixes.in_layout(group))


def test_a_common_beginning_waits_for_a_lane_that_has_no_memory():
    """What goes on from it would be of no use to that lane without."""
    full = FullLane()
    full.follow(until=lambda: full.common <= full.in_layout(FIRST) and full.courier.is_quiet)
    assert full.common <= full.in_layout(FIRST)
    assert full.common <= full.in_layout(SOURCE)
    full.give_memory()
    full.follow(until=lambda: False)
    assert full.following.is_over
    assert full.common <= full.in_layout(SECOND)
    assert full.in_layout(FIRST) | full.in_layout(SECOND) == full.hashes
    assert not full.in_layout(SOURCE)


def test_a_common_beginning_that_a_lane_has_already_stays_for_the_one_that_lacks_it():
    full = FullLane()
    sources = [b for b in full.kv.prefixes.idle(SOURCE) if b.hash in full.common]
    transfer = Transfer(full.kv, SOURCE, FIRST)
    assert transfer.reserve(sources) == len(full.common)
    transfer.copy(len(sources))
    transfer.settle()
    transfer.share()
    transfer.let_go(len(sources))
    full.following.advance(32)
    assert full.common <= full.in_layout(SOURCE)
    full.give_memory()
    full.follow(until=lambda: False)
    assert full.common <= full.in_layout(SECOND)


def test_following_ends_though_a_lane_never_gets_memory():
    full = FullLane()
    full.follow(until=lambda: False)
    assert full.following.is_over
