"""Products cut into parts are the products."""

import pytest
import torch
import torch.nn.functional as F

from nitsum.model.layers import linear

torch.set_num_threads(1)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 15, 16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_the_whole_product(num_rows: int, with_bias: bool):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 1600, generator=generator)
    wide = torch.randn(300, 3200, generator=generator)
    weight = wide[:, 1600:]  # a shard of columns: rows apart
    bias = torch.randn(300, generator=generator) if with_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)
