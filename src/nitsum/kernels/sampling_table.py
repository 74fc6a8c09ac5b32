"""What sampling needs to know of each slot, as one line of integers on the device.

A line is packed on the host when a sequence joins, and uploaded with one copy:

    0 temperature  1 top_p  2 min_p  3 presence  4 frequency  5 repetition     (float32 bits)
    6 top_k  7 num_prompt  8 min_tokens  9 num_known  10 stops  11 biases  12-13 seed (low, high)
    16..        stop token ids
    16 + S..    biased token ids, then their biases (float32 bits)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nitsum.errors import bad_request
from nitsum.messages import Join
from nitsum.request import SamplingParams

Ints = npt.NDArray[np.int32]

MAX_STOPS = 64
MAX_BIASES = 512
STOPS_AT = 16
BIASES_AT = STOPS_AT + MAX_STOPS
VALUES_AT = BIASES_AT + MAX_BIASES
LINE_INTS = VALUES_AT + MAX_BIASES
NUM_KNOWN_AT = 9
SEED_BITS = (1 << 64) - 1

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as on CPU ranks."""


class SamplingNeeds(NamedTuple):
    """Which stages a batch of draws needs; the host knows, and leaves the others out."""

    shapes_logits: bool = False
    random: bool = False
    top_k: bool = False
    top_p: bool = False
    keeps_grammar: bool = False
    reports: bool = False

    def union(self, other: SamplingNeeds) -> SamplingNeeds:
        return SamplingNeeds(*(a or b for a, b in zip(self, other, strict=True)))


def sampling_needs(sampling: SamplingParams) -> SamplingNeeds:
    """What drawing for one request involves."""
    s = sampling
    shapes = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
    random = s.temperature >= GREEDY_BELOW
    return SamplingNeeds(
        shapes_logits=bool(shapes or s.logit_bias or s.min_tokens),
        random=random,
        top_k=random and s.top_k > 0,
        top_p=random and s.top_p < 1,
        keeps_grammar=s.grammar is not None,
        reports=s.logprobs is not None or s.return_logits or s.return_hidden,
    )


def sampling_lines(joins: Sequence[Join]) -> Ints:
    """[joins, LINE_INTS] int32, the slots' lines of the table.

    Raises `ApiError` when there are more stop tokens or biases than a line has room for.
    """
    lines = np.zeros((len(joins), LINE_INTS), dtype=np.int32)
    for line, join in zip(lines, joins, strict=True):
        _write_line(line, join)
    return lines


def _write_line(line: Ints, join: Join) -> None:
    s = join.sampling
    floats = (s.temperature, s.top_p, s.min_p, s.presence_penalty, s.frequency_penalty)
    line[:6] = _bits([*floats, s.repetition_penalty])
    num_stops, num_biases = len(s.stop_token_ids), len(s.logit_bias)
    counts = (num_stops, num_biases)
    line[6:12] = (s.top_k, join.num_prompt, s.min_tokens, join.num_known, *counts)
    line[12:14] = np.array([s.seed & SEED_BITS], dtype=np.uint64).view(np.int32)
    if num_stops or num_biases:
        _check_room(s)
        line[STOPS_AT : STOPS_AT + num_stops] = s.stop_token_ids
        line[BIASES_AT : BIASES_AT + num_biases] = list(s.logit_bias)
        line[VALUES_AT : VALUES_AT + num_biases] = _bits(list(s.logit_bias.values()))


def empty_table(num_slots: int, device: torch.device | str) -> torch.Tensor:
    """[slots, LINE_INTS] int32; `table[:, NUM_KNOWN_AT]` are the known counts."""
    return torch.zeros(num_slots, LINE_INTS, dtype=torch.int32, device=device)


def _bits(values: list[float]) -> Ints:
    return np.array(values, dtype=np.float32).view(np.int32)


def _check_room(sampling: SamplingParams) -> None:
    if len(sampling.stop_token_ids) > MAX_STOPS:
        raise bad_request(f"At most {MAX_STOPS} stop tokens are supported.", "stop_token_ids")
    if len(sampling.logit_bias) > MAX_BIASES:
        raise bad_request(f"At most {MAX_BIASES} biased tokens are supported.", "logit_bias")
