"""A request as the client sent it."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. Defaults follow OpenAI's API where it has the field."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """With the token's position it is the whole state of the random stream."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """Report the drawn token's log-probability and this many alternatives; None reports nothing."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, the model's own end tokens included unless ignored."""
    min_tokens: int = 0
    """Stop tokens are masked until this many tokens are out."""
    forced_tokens: tuple[int, ...] = ()
    """Teacher forcing, for verification: the first tokens of the answer are these."""
    return_logits: bool = False
    """For verification: float32 logits of each sampled position come back with its token."""
    return_hidden: bool = False
    """For embeddings: the last layer's normed state at the prompt's last token comes back."""
    grammar: str | None = None
    """What the answer must match, in llguidance's notation; it ends where the grammar does."""


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One completion to produce; crosses from the server to the engine."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    tier: str = "default"
    """The tier the client may have, after the key's ceiling."""
    tier_asked: str = "default"
    arrival_s: float = 0.0
    """On the host's monotonic clock."""
    order: int = 0
    """The body's `priority`: lower first, inside a tier only."""
    tenant: str = ""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    """Targets the client named; they order inside the tier and promise nothing."""
    chain_id: str | None = None
    chain_deadline_s: float | None = None
    """Absolute time by which the whole chain should be complete."""
    prefix_hashes: list[int] = []
    """Block hashes of the prompt where the sender knows them (traces); else computed."""
