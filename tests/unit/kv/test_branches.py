"""The tree of cached prefixes counts what there is, and forgets what there is not."""

from __future__ import annotations

from random import Random

from nitsum.kv.blocks import Block
from nitsum.kv.branches import MOST_FORKS, Branches
from nitsum.kv.prefix import PrefixIndex
from nitsum.plan import Group

LANE = Group(1, 0)
WIDE = Group(2, 0)


def add(prefixes: PrefixIndex, hashes: list[int], group: Group = LANE) -> list[Block]:
    """Cache what is new of a prefix; all of its blocks."""
    for place in range(len(hashes)):
        prefixes.add(Block(group, []), hashes, place)
    return [prefixes.in_layout(group)[block_hash] for block_hash in hashes]


def test_what_follows_a_block_second_begins_a_branch():
    prefixes = PrefixIndex()
    first = add(prefixes, [1, 2, 3, 4])
    second = add(prefixes, [1, 2, 5, 6])
    third = add(prefixes, [1, 2, 5, 7, 8])
    trunk, fork = first[0].branch, second[2].branch
    assert trunk is not None
    assert fork is not None
    assert {block.branch for block in first} == {trunk}
    assert (fork.parent, fork.at) == (trunk, 2)
    assert trunk.forks == {2: 4}
    assert third[3].branch is not fork
    assert fork.forks == {3: 2}
    assert [block.place for block in third] == [0, 1, 2, 3, 4]


def test_copies_are_of_the_branch_of_their_source_and_counted():
    prefixes = PrefixIndex()
    blocks = add(prefixes, [1, 2]) + add(prefixes, [1, 3])[1:]
    copies = [Block(WIDE, []) for _ in blocks]
    for copy, source in zip(copies, blocks, strict=True):
        assert prefixes.add_copy(copy, source)
        assert not prefixes.add_copy(Block(WIDE, []), source)
    trunk = blocks[0].branch
    assert trunk is not None
    assert trunk.num_blocks == 6
    assert trunk.forks == {1: 2}
    later = add(prefixes, [1, 4], WIDE)
    assert later[1].branch is not trunk, "the copy knows that it is followed"


def test_what_comes_in_place_of_a_follower_that_is_gone_goes_on_in_its_branch():
    prefixes = PrefixIndex()
    first = add(prefixes, [1, 2, 3])
    trunk = first[0].branch
    assert trunk is not None
    for comes in (4, 5):
        prefixes.forget(prefixes.in_layout(LANE)[comes - 1])
        assert add(prefixes, [1, 2, comes])[2].branch is trunk
    assert not trunk.forks, "nothing forks off"
    assert add(prefixes, [1, 2, 3])[2].branch is not trunk
    assert trunk.forks == {2: 1}


def test_a_follower_that_is_in_another_layout_is_not_gone():
    """It may be on its way to this one, or come again."""
    prefixes = PrefixIndex()
    sources = add(prefixes, [1, 2])
    prefixes.add_copy(Block(WIDE, []), sources[0])
    trunk = sources[0].branch
    fork = add(prefixes, [1, 3], WIDE)[1].branch
    assert fork is not trunk
    assert add(prefixes, [1, 2], WIDE)[1].branch is trunk, "it comes after its own"


def test_what_comes_again_is_of_the_branch_that_it_heads():
    prefixes = PrefixIndex()
    add(prefixes, [1, 2])
    fork = add(prefixes, [1, 3, 4])[1].branch
    for gone in (2, 3):
        prefixes.forget(prefixes.in_layout(LANE)[gone])
    assert add(prefixes, [1, 3])[1].branch is fork


def test_nothing_is_left_of_branches_without_blocks():
    random = Random(0)
    prefixes = PrefixIndex()
    paths = [[random.randint(1, 3)] for _ in range(80)]
    for path in paths:
        for _ in range(12):
            path.append(10 * path[-1] + random.randint(1, 3))
    blocks = list({block: None for path in paths for block in add(prefixes, path)})
    roots = {block.branch for block in blocks if block.place == 0}
    assert sum(root.num_blocks for root in roots if root) == len(blocks)
    random.shuffle(blocks)
    for block in blocks:
        prefixes.forget(block)
    assert not prefixes._branches._by_key
    assert not any(root.forks or root.num_blocks for root in roots if root)


def test_forks_of_forks_end_somewhere():
    branches = Branches()
    branch = branches.begin(0, None, 0)
    for i in range(1, 5 * MOST_FORKS):
        branch = branches.begin(i, branch, i)
    assert branch.depth == MOST_FORKS
