"""Drawing tokens on CPU ranks: functions of the logits, the row and the request's parameters.

    logits -> penalties, bias, masked stop tokens, grammar -> argmax, or
              temperature -> min_p -> top_k -> top_p -> inverse of the cumulative sum

The uniform number is a hash of (seed, position): a request that is moved, paused or replayed draws
what it would have drawn. Reported log-probabilities are those of the raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nitsum.messages import TokenLogprobs
from nitsum.request import SamplingParams
from nitsum.worker.grammar import GrammarMasks
from nitsum.worker.slots import Draw

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them leaves nothing but the maximum anyway."""

_MASK = (1 << 64) - 1


class Drawn(NamedTuple):
    """Tokens, and what was asked to be reported with them; empty lists when nobody asked."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    logits: list[bytes | None]
    hidden: list[bytes | None]


def sample(
    logits: torch.Tensor,
    draws: Sequence[Draw],
    grammars: GrammarMasks | None = None,
    hidden: torch.Tensor | None = None,
) -> Drawn:
    """Draw from float32 `logits` [m, V], one row a draw; `logits` stays as it is.

    `grammars` is needed where a draw has a grammar, `hidden` [m, hidden] where one asks for it.
    """
    tokens = _draw_all(logits, draws, grammars)
    scores = _all_logprobs(logits, draws, tokens)
    raw = _rows(logits, [draw.sampling.return_logits for draw in draws])
    states = _rows(hidden, [draw.sampling.return_hidden for draw in draws])
    return Drawn(tokens, scores, raw, states)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else; splitmix64's finalizer over both.

    It has 52 bits, so that its product with any total stays below the total after rounding.
    """
    mixed = _mix(_mix(seed & _MASK) + position)
    return (mixed >> 12) * 2.0**-52


def _mix(value: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014) from state `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


# --- drawing -----------------------------------------------------------------------------------


def _draw_all(
    logits: torch.Tensor, draws: Sequence[Draw], grammars: GrammarMasks | None
) -> list[int]:
    if any(_shapes_logits(draw) for draw in draws):
        logits = _shaped(logits, draws, grammars)
    tokens: list[int] = logits.argmax(-1).tolist()
    random = [i for i, draw in enumerate(draws) if _is_random(draw)]
    if random:
        drawn = _draw_random(logits[random], [draws[i] for i in random])
        for i, token in zip(random, drawn, strict=True):
            tokens[i] = token
    return [t if draw.known is None else draw.known for t, draw in zip(tokens, draws, strict=True)]


def _is_random(draw: Draw) -> bool:
    return draw.known is None and draw.sampling.temperature >= GREEDY_BELOW


def _draw_random(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Temperature, filters, and the inverse of the cumulative sum. [r, V] -> r tokens."""
    temperatures = torch.tensor([draw.sampling.temperature for draw in draws])
    shifted = logits - logits.max(-1, keepdim=True).values
    probs = torch.softmax(shifted / temperatures[:, None], -1, dtype=torch.float64)
    for row, draw in zip(probs, draws, strict=True):
        filter_probs(row, draw.sampling)
    cumulative = probs.cumsum(-1)
    uniforms = [uniform(draw.sampling.seed, len(draw.row)) for draw in draws]
    targets = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, targets, right=True)
    return found.clamp_(max=logits.shape[1] - 1).flatten().tolist()


def filter_probs(probs: torch.Tensor, sampling: SamplingParams) -> None:
    """Zero what min_p, top_k and top_p exclude, in this order, in place. [V], not renormalised.

    Tokens as likely as the last one kept are kept too.
    """
    if sampling.min_p > 0:
        _drop_below(probs, sampling.min_p * probs.max())
    if 0 < sampling.top_k < len(probs):
        _drop_below(probs, probs.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1:
        _drop_below(probs, _nucleus_floor(probs, sampling.top_p))


def _drop_below(probs: torch.Tensor, floor: torch.Tensor) -> None:
    probs.masked_fill_(probs < floor, 0)


def _nucleus_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probability of the last token of the smallest set that holds `top_p` of the total.

    Most nuclei are small, so the whole vocabulary is sorted only where its best part falls short
    (5 ms for 49,152 tokens on one core).
    """
    wanted = top_p * probs.sum()
    for count in (256, 4096, len(probs)):
        likely = probs.topk(min(count, len(probs))).values
        cumulative = likely.cumsum(0)
        if cumulative[-1] >= wanted:
            return likely[int(torch.searchsorted(cumulative, wanted))]
    return likely[-1]


# --- shaping logits ------------------------------------------------------------------------------


def _shapes_logits(draw: Draw) -> bool:
    s = draw.sampling
    return bool(
        s.logit_bias
        or s.presence_penalty
        or s.frequency_penalty
        or s.repetition_penalty != 1.0
        or _masks_stops(draw)
        or _has_grammar(draw)
    )


def _has_grammar(draw: Draw) -> bool:
    return draw.sampling.grammar is not None and draw.known is None


def _masks_stops(draw: Draw) -> bool:
    return len(draw.row) - draw.num_prompt < draw.sampling.min_tokens


def _shaped(
    logits: torch.Tensor, draws: Sequence[Draw], grammars: GrammarMasks | None
) -> torch.Tensor:
    """A copy of `logits` with each draw's penalties, bias and masks applied."""
    shaped = logits.clone()
    for row, draw in zip(shaped, draws, strict=True):
        if _shapes_logits(draw):
            _penalize(row, draw)
            _add_bias(row, draw.sampling.logit_bias)
            if _masks_stops(draw):
                row[_within(draw.sampling.stop_token_ids, len(row))] = -torch.inf
            if _has_grammar(draw):
                assert grammars is not None
                grammars.forbid(row, draw)
    return shaped


def _penalize(row: torch.Tensor, draw: Draw) -> None:
    """Repetition over all tokens so far, then frequency and presence over the answer's."""
    s = draw.sampling
    if s.repetition_penalty != 1.0:
        seen = draw.row.unique().long()
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / s.repetition_penalty, values * s.repetition_penalty
        )
    if s.frequency_penalty or s.presence_penalty:
        answer, counts = draw.row[draw.num_prompt :].unique(return_counts=True)
        row[answer.long()] -= s.frequency_penalty * counts + s.presence_penalty


def _add_bias(row: torch.Tensor, bias: dict[int, float]) -> None:
    tokens = _within(bias, len(row))
    row[tokens] += torch.tensor([bias[token] for token in tokens], dtype=row.dtype)


def _within(tokens: Sequence[int] | dict[int, float], vocab_size: int) -> list[int]:
    """Ids the model has; tokenizers know some that it has not."""
    return [token for token in tokens if 0 <= token < vocab_size]


# --- what is reported ----------------------------------------------------------------------------


def _all_logprobs(
    logits: torch.Tensor, draws: Sequence[Draw], tokens: list[int]
) -> list[TokenLogprobs | None]:
    if all(draw.sampling.logprobs is None for draw in draws):
        return []
    return [
        None
        if draw.sampling.logprobs is None
        else _logprobs(row, token, min(draw.sampling.logprobs, len(row)))
        for row, draw, token in zip(logits, draws, tokens, strict=True)
    ]


def _logprobs(row: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    logprobs = torch.log_softmax(row, -1)
    top = logprobs.topk(num_top)
    return TokenLogprobs(float(logprobs[token]), top.indices.tolist(), top.values.tolist())


def _rows(values: torch.Tensor | None, wanted: Sequence[bool]) -> list[bytes | None]:
    """Rows of [m, width] as float32 bytes, where they are wanted; none at all if nowhere."""
    if not any(wanted):
        return []
    assert values is not None
    return [
        row.float().numpy().tobytes() if wants else None
        for row, wants in zip(values, wanted, strict=True)
    ]
