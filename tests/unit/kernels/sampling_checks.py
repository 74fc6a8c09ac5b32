"""Sampling kernels against the CPU ranks' sampler, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nitsum.kernels import draw as drawing
from nitsum.kernels import sampling_table as tables
from nitsum.kernels.mask_logits import mask_logits
from nitsum.kernels.shape_logits import shape_logits
from nitsum.messages import Join
from nitsum.request import SamplingParams
from nitsum.worker import sampler
from nitsum.worker.slots import Draw
from tests.unit.kernels.kit import DEVICE, randn


def ints(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def line_of(request: SamplingParams, num_prompt: int = 0, num_known: int = 0) -> torch.Tensor:
    """A slot's line of the sampling table."""
    lines = tables.sampling_lines([Join(0, [], num_prompt, num_known, request)])
    return torch.from_numpy(lines)[0].to(DEVICE)


def check_sampling(
    requests: Sequence[SamplingParams],
    vocab: int,
    seed: int,
    num_prompt: int = 20,
    length: int = 60,
) -> None:
    """One draw a request, slots in reverse order, with a padding draw at the end."""
    m = len(requests)
    generator = torch.Generator().manual_seed(seed)
    # Few different tokens, so that they repeat in prompt and answer.
    rows = torch.randint(0, min(vocab, 40), (m, length), generator=generator, dtype=torch.int32)
    positions = torch.randint(num_prompt, length, (m,), generator=generator).tolist()
    logits = randn(m + 1, vocab, seed=seed + 1) * 4
    table = tables.empty_table(m, DEVICE)
    for slot, request in enumerate(requests):
        table[slot] = line_of(request, num_prompt)
    order = list(reversed(range(m)))
    slots, where = ints([*order, -1]), ints([*(positions[i] for i in order), 0])
    draws = [Draw(requests[i], rows[i, : positions[i]], num_prompt, None) for i in order]
    expected_logits = [shaped_slowly(*pair) for pair in zip(logits[:m].cpu(), draws, strict=True)]
    expected = sampler.sample(logits[:m].cpu(), draws).tokens

    counts = torch.zeros(m + 1, vocab, dtype=torch.int32, device=DEVICE)
    shaped = logits.clone()
    shape_logits(shaped, rows.to(DEVICE), table, slots, where, counts, length)
    torch.testing.assert_close(shaped[:m].cpu(), torch.stack(expected_logits), rtol=1e-5, atol=1e-5)
    assert torch.equal(shaped[m], logits[m])
    assert not counts.any(), "the scratch is zero again"

    needs = tables.SamplingNeeds()
    for request in requests:
        needs = needs.union(tables.sampling_needs(request))
    buffers = drawing.draw_buffers(m + 3, vocab, DEVICE)
    tokens = torch.full((m + 1,), -1, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # buffers hold the last draw's leavings
        drawing.draw(shaped, table, slots, where, needs, buffers, tokens)
        assert tokens[:m].tolist() == expected
        assert int(tokens[m]) == int(logits[m].argmax())


def shaped_slowly(row: torch.Tensor, draw: Draw) -> torch.Tensor:
    """What penalties, biases and masks mean, one token at a time."""
    s, row, answer = draw.sampling, row.clone(), draw.row[draw.num_prompt :].tolist()
    for token in set(draw.row.tolist()):
        factor = s.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        if token in answer:
            row[token] -= s.presence_penalty + s.frequency_penalty * answer.count(token)
    for token, bias in s.logit_bias.items():
        if token < len(row):
            row[token] += bias
    if len(answer) < s.min_tokens:
        row[[token for token in s.stop_token_ids if token < len(row)]] = -torch.inf
    return row


def check_mask(m: int, vocab: int, rows: Sequence[int], seed: int) -> None:
    """Rows of logits that lie apart, as a lane's do; the last bits of a mask are nobody's."""
    whole = randn(m, vocab + 16, seed=seed)
    logits = whole[:, :vocab]
    words = -(-vocab // 32)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.randint(0, 2, (len(rows), 32 * words), generator=generator, dtype=torch.int64)
    bits = (allowed.view(len(rows), words, 32) << torch.arange(32)).sum(-1)
    lines = torch.cat([torch.tensor(rows)[:, None], bits], 1).to(torch.int32)
    expected = whole.clone()
    for row, line in zip(rows, allowed, strict=True):
        expected[row, :vocab][line[:vocab].to(DEVICE) == 0] = -torch.inf
    mask_logits(logits, lines.to(DEVICE))
    assert torch.equal(whole, expected)


def check_greedy(m: int, vocab: int, seed: int) -> None:
    logits = randn(m, vocab, seed=seed)
    logits[:, vocab // 2] = logits[:, vocab // 3] = 9.0  # equal: the first one counts
    out = torch.zeros(m, dtype=torch.int32, device=DEVICE)
    drawing.greedy(logits, drawing.draw_buffers(m, vocab, DEVICE), out)
    assert out.tolist() == [vocab // 3] * m


def check_floor(logits: torch.Tensor, request: SamplingParams) -> None:
    """The floor that the searches find keeps what the CPU's filters keep."""
    m, vocab = logits.shape
    table = line_of(request).expand(m, -1).contiguous()
    buffers = drawing.draw_buffers(m, vocab, DEVICE)
    out = torch.zeros(m, dtype=torch.int32, device=DEVICE)
    slots = ints(range(m))
    needs = tables.sampling_needs(request)
    drawing.draw(logits, table, slots, slots, needs, buffers, out)
    # Copies take turns: a sum, and for each search its passes and another sum.
    floors = buffers.floors[(1 + (needs.top_k + needs.top_p) * (drawing.PASSES + 1)) % 2]
    weights = ((logits - logits.amax(-1, keepdim=True)) / request.temperature).exp()
    kept = (weights.cpu().view(torch.int32) >> 11) >= floors[:, :1].cpu()
    for row, ours in zip(logits.cpu(), kept, strict=True):
        probs = torch.softmax(row / request.temperature, -1, dtype=torch.float64)
        sampler.filter_probs(probs, request)
        # Equally likely tokens below 2^-40 of the best one cannot be told apart, nor drawn.
        visible = torch.softmax(row / request.temperature, -1) > 1e-11
        assert torch.equal((probs > 0) & visible, ours & visible)
