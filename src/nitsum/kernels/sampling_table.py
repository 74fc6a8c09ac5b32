"""What sampling needs to know of each slot, as one line of integers on the device.

A line is packed on the host when a sequence joins, and uploaded with one copy:

    0 temperature  1 top_p  2 min_p  3 presence  4 frequency  5 repetition     (float32 bits)
    6 top_k  7 num_prompt  8 min_tokens  9 num_known  10 stops  11 biases  12-13 seed (low, high)
    16..        stop token ids
    16 + S..    biased token ids, then their biases (float32 bits)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nitsum.errors import bad_request
from nitsum.request import SamplingParams

MAX_STOPS = 64
MAX_BIASES = 512
STOPS_AT = 16
BIASES_AT = STOPS_AT + MAX_STOPS
VALUES_AT = BIASES_AT + MAX_BIASES
LINE_INTS = VALUES_AT + MAX_BIASES
NUM_KNOWN_AT = 9

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as on CPU ranks."""


class SamplingNeeds(NamedTuple):
    """Which stages a batch of draws needs; the host knows, and leaves the others out."""

    shapes_logits: bool = False
    random: bool = False
    top_k: bool = False
    top_p: bool = False

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
    )


def sampling_line(sampling: SamplingParams, num_prompt: int, num_known: int) -> torch.Tensor:
    """[LINE_INTS] int32 for a slot's line of the table, on the CPU.

    Raises `ApiError` when there are more stop tokens or biases than a line has room for.
    """
    s = sampling
    _check_room(s)
    line = torch.zeros(LINE_INTS, dtype=torch.int32)
    floats = (s.temperature, s.top_p, s.min_p, s.presence_penalty, s.frequency_penalty)
    line[:6] = _bits([*floats, s.repetition_penalty])
    counts = (len(s.stop_token_ids), len(s.logit_bias))
    line[6:12] = torch.tensor([s.top_k, num_prompt, s.min_tokens, num_known, *counts])
    line[12:14] = torch.tensor([_signed64(s.seed)]).view(torch.int32)
    line[STOPS_AT : STOPS_AT + counts[0]] = torch.tensor(s.stop_token_ids, dtype=torch.int32)
    line[BIASES_AT : BIASES_AT + counts[1]] = torch.tensor(list(s.logit_bias), dtype=torch.int32)
    line[VALUES_AT : VALUES_AT + counts[1]] = _bits(list(s.logit_bias.values()))
    return line


def empty_table(num_slots: int, device: torch.device | str) -> torch.Tensor:
    """[slots, LINE_INTS] int32; `table[:, NUM_KNOWN_AT]` are the known counts."""
    return torch.zeros(num_slots, LINE_INTS, dtype=torch.int32, device=device)


def _bits(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)


def _signed64(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _check_room(sampling: SamplingParams) -> None:
    if len(sampling.stop_token_ids) > MAX_STOPS:
        raise bad_request(f"At most {MAX_STOPS} stop tokens are supported.", "stop_token_ids")
    if len(sampling.logit_bias) > MAX_BIASES:
        raise bad_request(f"At most {MAX_BIASES} biased tokens are supported.", "logit_bias")
