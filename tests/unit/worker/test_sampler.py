"""The sampler against straightforward references, one token at a time."""

from __future__ import annotations

import math
import struct
from collections import Counter
from itertools import pairwise

import pytest
import torch

from nitsum.request import SamplingParams
from nitsum.worker.sampler import filter_probs, sample, uniform
from nitsum.worker.slots import Draw

VOCAB = 40


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def draw(row: list[int], num_prompt: int = 1, known: int | None = None, **params: object) -> Draw:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Draw(sampling, torch.tensor(row, dtype=torch.int32), num_prompt, known)


def draw_many(logits: torch.Tensor, num_draws: int, **params: object) -> Counter[int]:
    """Tokens over many positions of one request's random stream."""
    draws = [draw([0] * (1 + i), **params) for i in range(num_draws)]
    return Counter(sample(logits.expand(num_draws, VOCAB), draws).tokens)


# --- greedy, and what changes logits ------------------------------------------------------------


def test_greedy_takes_the_maximum_of_each_row(logits: torch.Tensor):
    batch = torch.stack([logits, -logits, logits.roll(5)])
    drawn = sample(batch, [draw([1], temperature=0.0) for _ in range(3)])
    assert drawn.tokens == batch.argmax(-1).tolist()
    assert (drawn.logprobs, drawn.logits) == ([], [])


def test_a_known_token_wins_over_every_rule(logits: torch.Tensor):
    rules = {"logit_bias": {5: 100.0}, "temperature": 0.0}
    drawn = sample(
        torch.stack([logits, logits]), [draw([1], known=17, **rules), draw([1], **rules)]
    )
    assert drawn.tokens == [17, 5]


def penalized(logits: torch.Tensor, row: list[int], num_prompt: int, **p: float) -> list[float]:
    """Written out: repetition over all tokens, frequency and presence over the answer's."""
    result = logits.tolist()
    for token in set(row):
        factor = p.get("repetition_penalty", 1.0)
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token, count in Counter(row[num_prompt:]).items():
        result[token] -= count * p.get("frequency_penalty", 0.0) + p.get("presence_penalty", 0.0)
    return result


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 3.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.4},
    ],
)
def test_penalties(logits: torch.Tensor, penalties: dict[str, float]):
    """Greedy text with penalties, token by token, is that of the reference."""
    row, expected = [3, 9, 9], [3, 9, 9]
    for _ in range(30):
        reference = penalized(logits, expected, 2, **penalties)
        expected.append(reference.index(max(reference)))
        row += sample(logits[None], [draw(row, 2, temperature=0.0, **penalties)]).tokens
    assert row == expected
    assert len(set(row[3:])) > 1, "the penalties changed nothing"


def test_bias_moves_a_token_up_or_out(logits: torch.Tensor):
    best = int(logits.argmax())
    up = draw([1], temperature=0.0, logit_bias={7: 100.0, 10**6: 100.0})
    out = draw([1], temperature=0.0, logit_bias={best: -100.0})
    tokens = sample(torch.stack([logits, logits]), [up, out]).tokens
    assert tokens == [7, int(logits.topk(2).indices[1])]


def test_stop_tokens_are_masked_until_enough_tokens_are_out(logits: torch.Tensor):
    best, second = logits.topk(2).indices.tolist()
    rules = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (best,)}
    tokens = [sample(logits[None], [draw([4] * n, 3, **rules)]).tokens[0] for n in (3, 4, 5)]
    assert tokens == [second, second, best]


def test_stop_tokens_are_masked_from_random_draws_too(logits: torch.Tensor):
    best = int(logits.argmax())
    rules = {"min_tokens": 500, "stop_token_ids": (best,), "seed": 1}
    assert best not in draw_many(logits, 300, **rules)
    assert best in draw_many(logits, 300, seed=1)


def test_one_request_s_rules_leave_its_neighbours_alone(logits: torch.Tensor):
    batch = torch.stack([logits, logits])
    before = batch.clone()
    drawn = sample(batch, [draw([1], logit_bias={7: 100.0}), draw([1], temperature=0.0)])
    assert drawn.tokens == [7, int(logits.argmax())]
    torch.testing.assert_close(batch, before, rtol=0, atol=0)


# --- random draws -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(logits: torch.Tensor, params: dict[str, float]):
    """Pearson's chi-squared over the tokens that are expected at least five times."""
    num_draws = 3000
    counts = draw_many(logits, num_draws, seed=11, **params)
    probs = reference_probs(logits.tolist(), **params)
    assert all(probs[token] > 0 for token in counts), "drew a token that was excluded"
    expected = [num_draws * p for p in probs]
    cells = [(counts[t], e) for t, e in enumerate(expected) if e >= 5]
    statistic = sum((seen - e) ** 2 / e for seen, e in cells)
    degrees = len(cells) - 1
    # Wilson-Hilferty: chi-squared is nearly normal in its cube root. 4 sigma.
    limit = degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


def reference_probs(
    logits: list[float],
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[float]:
    """One filter after the other, renormalising in between."""
    probs = normalise([math.exp(x / temperature) for x in logits])
    probs = normalise([p if p >= min_p * max(probs) else 0.0 for p in probs])
    if top_k:
        floor = sorted(probs, reverse=True)[top_k - 1]
        probs = normalise([p if p >= floor else 0.0 for p in probs])
    kept, total = set[int](), 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
        if total >= top_p:
            break
        kept.add(token)
        total += probs[token]
    return normalise([p if t in kept else 0.0 for t, p in enumerate(probs)])


def normalise(weights: list[float]) -> list[float]:
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_the_nucleus_in_a_large_vocabulary(top_p: float):
    """The 256 likeliest tokens are enough, the 4096 likeliest, or none but all."""
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(1))
    probs = torch.softmax(logits.double(), 0)
    filter_probs(probs, SamplingParams(top_p=top_p))
    expected = torch.tensor(reference_probs(logits.tolist(), top_p=top_p)) > 0
    assert torch.equal(probs > 0, expected)


def test_a_draw_depends_on_seed_and_position_alone(logits: torch.Tensor):
    """Not on the batch, the slot, the rank, or how often it was drawn before."""
    rows = [[1] * n for n in range(1, 40)]
    alone = [sample(logits[None], [draw(row, seed=5)]).tokens[0] for row in rows]
    together = sample(logits.expand(39, VOCAB), [draw(row, seed=5) for row in rows]).tokens
    other_seed = sample(logits.expand(39, VOCAB), [draw(row, seed=6) for row in rows]).tokens
    assert alone == together
    assert alone != other_seed
    assert len(set(alone)) > 5


def test_uniform_numbers_look_uniform_along_positions_and_seeds():
    along_positions = [uniform(42, position) for position in range(4000)]
    along_seeds = [uniform(seed, 7) for seed in range(-2000, 2000)]
    for numbers in (along_positions, along_seeds):
        assert min(numbers) >= 0
        assert max(numbers) < 1
        deciles = Counter(int(10 * u) for u in numbers)
        assert all(300 < deciles[d] < 500 for d in range(10))
        mean = sum(a * b for a, b in pairwise(numbers)) / 3999
        assert abs(mean - 0.25) < 0.02, "neighbours are correlated"


def test_tiny_temperatures_and_infinite_logits_stay_finite(logits: torch.Tensor):
    holes = logits.clone()
    holes[::2] = -torch.inf
    drawn = sample(torch.stack([logits, holes]), [draw([1], temperature=2e-5), draw([1])])
    assert drawn.tokens[0] == int(logits.argmax())
    assert drawn.tokens[1] % 2 == 1


# --- what is reported ---------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_distribution(logits: torch.Tensor):
    rules = {"temperature": 0.3, "top_k": 1, "logit_bias": {7: 100.0}}
    draws = [draw([1], logprobs=3, **rules), draw([1], **rules), draw([1], logprobs=0, known=4)]
    first, none, forced = sample(logits.expand(3, VOCAB), draws).logprobs
    raw = torch.log_softmax(logits, -1)
    assert none is None
    assert first is not None
    assert forced is not None
    assert first.logprob == pytest.approx(raw[7].item())
    assert first.top_ids == raw.topk(3).indices.tolist()
    assert first.top_logprobs == pytest.approx(raw.topk(3).values.tolist())
    assert (forced.logprob, forced.top_ids) == (pytest.approx(raw[4].item()), [])


def test_logits_come_back_as_float32_bytes(logits: torch.Tensor):
    draws = [draw([1]), draw([1], return_logits=True, logit_bias={7: 100.0})]
    none, raw = sample(logits.expand(2, VOCAB), draws).logits
    assert none is None
    assert raw is not None
    assert struct.unpack(f"{VOCAB}f", raw) == tuple(logits.tolist())
