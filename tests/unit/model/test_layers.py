"""A product is the same whichever way it is computed."""

import pytest
import torch
import torch.nn.functional as F

from nitsum.model.layers import linear

torch.set_num_threads(1)


@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 31, 32])
@pytest.mark.parametrize("width", [300, 384])  # in parts of 192 rows: no, yes
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_the_whole_product(num_rows: int, width: int, with_bias: bool):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 1600, generator=generator)
    wide = torch.randn(width, 3200, generator=generator)
    weight = wide[:, 1600:]  # a shard of columns: rows apart
    bias = torch.randn(width, generator=generator) if with_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = linear(x, weight, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    assert out.is_contiguous()  # collectives see it as one row of numbers
