"""One unit of load: when it arrives, how long it is, who sends it, and what depends on it."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace
from functools import lru_cache

from nitsum.request import Request, SamplingParams

FIRST_TOKEN_ID = 16
"""Ids below are left out: many vocabularies keep their control tokens there."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt tokens drawn from `key`: the same key gives the same tokens, hence cache hits."""

    key: str
    num_tokens: int
    shared: bool = False
    """Others have it too, so its tokens are worth remembering."""

    def tokens(self, vocab_size: int) -> tuple[int, ...]:
        draw = _shared_tokens if self.shared else _random_tokens
        return draw(self.key, self.num_tokens, vocab_size)


@dataclass(frozen=True, slots=True)
class CallScript:
    """One call of a chain."""

    num_new: int
    """Prompt tokens it adds to the conversation so far."""
    num_output: int
    think_s: float
    """From the end of the call before to its arrival: tools run, someone reads."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Dependent calls: each extends the prompt and the answer of the one before."""

    chain_id: str
    calls: tuple[CallScript, ...]
    deadline_s: float | None
    """For all calls together, from the first one's arrival."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A request to be sent `at_s` after the run's start.

    The driver sends it, and if it belongs to a chain asks `following` for the next call once the
    answer is complete.
    """

    request_id: str
    at_s: float
    num_output: int
    tier: str
    tenant: str
    segments: tuple[Segment, ...]
    """The prompt's new tokens, in order."""
    history: tuple[int, ...] = ()
    """Tokens before them: the conversation so far."""
    chain: Chain | None = None
    call: int = 0
    """Which call of the chain this is."""
    chain_start_s: float = 0.0

    @property
    def num_prompt(self) -> int:
        return len(self.history) + sum(segment.num_tokens for segment in self.segments)

    def prompt(self, vocab_size: int) -> list[int]:
        """The prompt's tokens; equal for equal items."""
        tokens = list(self.history)
        for segment in self.segments:
            tokens.extend(segment.tokens(vocab_size))
        return tokens

    def request(
        self, vocab_size: int, *, start_s: float = 0.0, prompt: list[int] | None = None
    ) -> Request:
        """The request to submit, in a run that started at `start_s` of the engine's clock.

        Greedy and without stop tokens: it produces exactly `num_output` tokens. `prompt` stands in
        for the item's own tokens where only their number matters.
        """
        chain = self.chain
        deadline = chain.deadline_s if chain else None
        return Request(
            request_id=self.request_id,
            prompt=self.prompt(vocab_size) if prompt is None else prompt,
            sampling=SamplingParams(max_tokens=self.num_output, temperature=0.0),
            tier=self.tier,
            tier_asked=self.tier,
            arrival_s=start_s + self.at_s,
            tenant=self.tenant,
            chain_id=chain.chain_id if chain else None,
            chain_deadline_s=None if deadline is None else start_s + self.chain_start_s + deadline,
        )

    def following(self, done_at_s: float, prompt: list[int], output: list[int]) -> WorkItem | None:
        """The chain's next call, once this one was answered; None when there is none.

        `done_at_s` counts from the run's start; `prompt` and `output` are what was sent and got.
        """
        chain = self.chain
        if chain is None or self.call + 1 >= len(chain.calls):
            return None
        call = self.call + 1
        script = chain.calls[call]
        request_id = f"{chain.chain_id}.{call}"
        return replace(
            self,
            request_id=request_id,
            at_s=done_at_s + script.think_s,
            num_output=script.num_output,
            segments=(Segment(request_id, script.num_new),),
            history=(*prompt, *output),
            call=call,
        )


def _random_tokens(key: str, num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Ids in FIRST_TOKEN_ID..vocab_size - 1, a function of the arguments."""
    words = array("I", random.Random(key).randbytes(4 * num_tokens))
    first = min(FIRST_TOKEN_ID, vocab_size - 1)
    span = vocab_size - first
    return tuple(first + word % span for word in words)


_shared_tokens = lru_cache(maxsize=1024)(_random_tokens)
