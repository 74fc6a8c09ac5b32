"""The arena as pages of every degree, and as rows of units."""

import pytest
import torch

from nitsum.kv.moves import page_units
from nitsum.plan import Group
from nitsum.shape import Geometry
from nitsum.shared import Region
from nitsum.worker.arena import Arena
from tests.processes.pool import SHAPE

BLOCK_TOKENS, NUM_UNITS = 3, 16


def make_arena(geometry: Geometry) -> Arena:
    region = Region(NUM_UNITS * geometry.unit_bytes(BLOCK_TOKENS, 4))
    return Arena(region, geometry, NUM_UNITS, BLOCK_TOKENS)


@pytest.mark.parametrize(("max_tp", "degree"), [(4, 1), (4, 2), (4, 4), (2, 1), (2, 2), (8, 8)])
def test_a_page_holds_the_heads_its_degree_works_on(max_tp: int, degree: int):
    """4 KV heads: at T = 8 there are more ranks than heads, and a page is one unit of one head."""
    geometry = Geometry(SHAPE, max_tp)
    keys = make_arena(geometry).pages(degree).keys(0)
    num_heads = len(geometry.kv_heads(degree, 0))
    per_page = len(page_units(Group(degree, 0), 0, geometry.num_units))
    assert keys.shape == (NUM_UNITS // per_page, num_heads, BLOCK_TOKENS, SHAPE.head_dim)


def test_every_view_is_the_same_memory():
    arena = make_arena(Geometry(SHAPE, 4))
    arena.unit_rows().zero_()
    for degree in (1, 2, 4):
        arena.pages(degree).values(1)[2].fill_(degree)
        unit = 2 * 4 // degree
        rows = arena.unit_rows()[SHAPE.num_layers + 1]
        assert (rows[unit : unit + 4 // degree] == degree).all()


def test_a_page_at_a_low_degree_is_the_higher_degrees_pages_side_by_side():
    """Page p at degree 1 is pages 2p and 2p + 1 at degree 2: doubling keeps a half in place."""
    arena = make_arena(Geometry(SHAPE, 4))
    arena.pages(1).keys(0).copy_(torch.randn(arena.pages(1).keys(0).shape))
    wide, narrow = arena.pages(1).keys(0)[3], arena.pages(2).keys(0)
    torch.testing.assert_close(wide, torch.cat([narrow[6], narrow[7]]), rtol=0, atol=0)


def test_layers_keys_and_values_do_not_overlap():
    arena = make_arena(Geometry(SHAPE, 4))
    pages = arena.pages(2)
    parts = [pages.keys(0), pages.keys(1), pages.values(0), pages.values(1)]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [part.unique().tolist() for part in parts] == [[0], [1], [2], [3]]
    assert sum(part.numel() for part in parts) * 4 == arena.size_bytes
    assert arena.unit_bytes == Geometry(SHAPE, 4).unit_bytes(BLOCK_TOKENS, 4)


def test_a_region_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="buffer"):
        Arena(Region(4096), Geometry(SHAPE, 4), 1024, BLOCK_TOKENS)
