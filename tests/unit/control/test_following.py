"""Which lane cached prefixes follow to at a switch, and what of them arrives."""

from __future__ import annotations

from random import Random

import pytest

from nitsum.kv.prefix import hash_prompt
from nitsum.plan import Group, read_plans
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
