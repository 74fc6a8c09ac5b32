"""A GPU lane's eager path against `transformers`: state, packing, kernels, sampler together.

Runs in Triton's interpreter where there is no GPU. Graphs need one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nitsum.messages import Join, Pages, Work
from nitsum.request import SamplingParams
from nitsum.worker.cuda.sampling import (
    FILTERED,
    GREEDY,
    RANDOM,
    DeviceSampler,
    captured_needs,
    read_hidden,
    read_logits,
    read_logprobs,
)
from tests.checkpoints import write_checkpoint
from tests.unit.worker.cuda.kit import DEVICE, SLOT, Rank

PROMPT = [5, 77, 130, 8, 199, 42, 17]
PAGES = [3, 9, 1]


def test_a_sequence_in_chunks_and_steps(tmp_path: Path):
    model = write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    rank = Rank(tmp_path)
    sampling = SamplingParams(temperature=0.0, logprobs=2, return_logits=True)
    join = Join(SLOT, [*PROMPT, 0, 11], len(PROMPT), len(PROMPT) + 2, sampling)
    nothing = rank.step([Work(SLOT, 0, 4, False)], [join], [Pages(SLOT, 0, [PAGES])])
    assert nothing.shape[0] == 0
    first = rank.step([Work(SLOT, 4, 3, True)], [], [])
    rest = [rank.step([Work(SLOT, 7 + i, 1, True)], [], []) for i in range(2)]
    row = rank.row(10)
    assert row[:9] == [*PROMPT, 0, 11]  # given tokens stay, whatever is drawn
    with torch.no_grad():
        expected = model(torch.tensor([row[:9]])).logits[0, 6:]
    logits = torch.cat([first, *rest])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert row[9] == int(expected[-1].argmax())
    assert rank.reports is not None
    (logprobs,) = read_logprobs(rank.reports, 1)
    assert logprobs is not None
    assert logprobs.top_ids[0] == row[9]
    assert logprobs.logprob == pytest.approx(float(expected[-1].log_softmax(-1)[row[9]]), abs=1e-4)
    (raw,) = read_logits(rank.reports, 1)
    assert raw == rest[-1].numpy().tobytes()
    assert read_hidden(rank.reports, 1) == []


def test_the_state_a_prompt_ends_in_is_reported_to_who_asks(tmp_path: Path):
    """Beside a request that does not ask, and where a step has one token only."""
    model = write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    rank = Rank(tmp_path)
    asks = SamplingParams(temperature=0.0, return_hidden=True)
    n = len(PROMPT)
    joins = [Join(SLOT, PROMPT, n, n, asks), Join(4, PROMPT, n, n, SamplingParams())]
    pages = [Pages(SLOT, 0, [PAGES]), Pages(4, 0, [[12, 13]])]
    rank.step([Work(4, 0, 5, True), Work(SLOT, 0, n, True)], joins, pages)
    with torch.no_grad():
        states = model.model(torch.tensor([PROMPT])).last_hidden_state[0]
    assert hidden_of(rank, 2)[0] is None
    for num_draws in (2, 1):
        state = hidden_of(rank, num_draws)[-1]
        assert state is not None
        found = torch.frombuffer(bytearray(state), dtype=torch.float32)
        torch.testing.assert_close(found, states[-1], rtol=0, atol=1e-4)
        rank.step([Work(SLOT, n - 1, 1, True)], [], [])


def hidden_of(rank: Rank, num_draws: int) -> list[bytes | None]:
    assert rank.reports is not None
    return read_hidden(rank.reports, num_draws)


def test_a_batch_draws_by_the_most_demanding_graph_it_needs():
    cases = [
        (SamplingParams(temperature=0.0), GREEDY),
        (SamplingParams(), RANDOM),
        (SamplingParams(top_p=0.9), FILTERED),
        (SamplingParams(top_k=5), FILTERED),
        (SamplingParams(logprobs=2), RANDOM),
    ]
    sampler = DeviceSampler(torch.zeros(8, 8, dtype=torch.int32, device=DEVICE), 4, 16)
    for slot, (sampling, captured) in enumerate(cases):
        sampler.join([Join(slot, [1], 1, 1, sampling)])
        assert captured_needs(sampler.needs([Work(slot, 0, 1, True)])) == captured
    assert captured_needs(sampler.needs([Work(i, 0, 1, True) for i in range(2)])) == RANDOM
    assert captured_needs(sampler.needs([Work(i, 0, 1, True) for i in range(4)])) == FILTERED
    sampler.join([Join(5, [1], 1, 1, SamplingParams(frequency_penalty=0.5))])
    assert captured_needs(sampler.needs([Work(5, 0, 1, True)])) is None
    assert captured_needs(sampler.needs([Work(5, 0, 1, False)])) == GREEDY
    sampler.join([Join(5, [1], 1, 1, SamplingParams(top_k=5, grammar="start: /a/"))])
    needs = sampler.needs([Work(5, 0, 1, True)])
    assert needs.keeps_grammar
    assert captured_needs(needs) == FILTERED  # masks are laid over the logits before
