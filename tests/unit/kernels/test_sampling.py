"""Drawing on the device equals drawing on CPU ranks, for every kind of request at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.errors import ApiError
from nitsum.kernels import draw as drawing
from nitsum.kernels import sampling_table as tables
from nitsum.request import SamplingParams
from tests.unit.kernels import sampling_checks as checks
from tests.unit.kernels.kit import DEVICE, randn

torch.set_num_threads(1)
few = settings(max_examples=6)

requests = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.0001]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    seed=st.sampled_from([0, 17, 2**63 + 5, -3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.dictionaries(st.sampled_from([3, 7, 39, 99999]), st.floats(-9, 9, width=32)),
    stop_token_ids=st.sampled_from([(), (5,), (7, 3)]),
    min_tokens=st.sampled_from([0, 30]),
)


@few
@given(st.lists(requests, min_size=1, max_size=4), st.sampled_from([50, 9000]), st.integers(0, 99))
def test_any_requests(drawn: list[SamplingParams], vocab: int, seed: int) -> None:
    checks.check_sampling(drawn, vocab, seed)


def test_greedy_takes_the_first_of_equals() -> None:
    checks.check_greedy(3, 9000, seed=2)


@pytest.mark.parametrize(("vocab", "rows"), [(203, [2]), (9001, [3, 0])])
def test_masks(vocab: int, rows: list[int]) -> None:
    checks.check_mask(4, vocab, rows, seed=vocab)


@pytest.mark.parametrize("wanted", [{"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.7},
                                    {"min_p": 0.2, "top_p": 0.8}, {"top_k": 8999}])  # fmt: skip
def test_floors(wanted: dict) -> None:
    logits = (randn(2, 9000, seed=5) * 3).bfloat16().float()  # as a model gives them: with ties
    checks.check_floor(logits, SamplingParams(temperature=0.8, **wanted))


def test_logprobs() -> None:
    logits = randn(3, 50, seed=1)
    tokens = torch.tensor([4, 0, 49], device=DEVICE)
    drawn, ids, values = drawing.logprobs(logits, tokens, 2)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(drawn, expected[range(3), tokens])
    torch.testing.assert_close(values, expected.gather(1, ids))
    assert ids[:, 0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "wanted", [{"stop_token_ids": tuple(range(65))}, {"logit_bias": dict.fromkeys(range(513), 1.0)}]
)
def test_too_long_lists_are_refused(wanted: dict) -> None:
    with pytest.raises(ApiError, match="At most"):
        checks.line_of(SamplingParams(**wanted))


def test_the_table_knows_what_is_known() -> None:
    table = tables.empty_table(2, DEVICE)
    table[1] = checks.line_of(SamplingParams(seed=-1), 5, 9)
    assert table[:, tables.NUM_KNOWN_AT].tolist() == [0, 9]
