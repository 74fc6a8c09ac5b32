"""How long a tier's answers are: a mean over the requests that came last, ended or not.

Of requests that have ended alone, the short ones come first after a change of the load, and the
long ones are left over when it has gone. So those that run count as far as they are: tokens of
all, over the number of those that have ended, which is the likeliest mean where lengths are about
exponential (censored as in Epstein and Sobel, J. Am. Stat. Assoc. 48, 1953).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MAX_REMEMBERED = 256
USUAL_TOKENS = 256.0
"""Assumed while none has ended."""
LEARNT = 0.05
"""Of the difference in seconds per token, from each answer."""


@dataclass(slots=True)
class Answer:
    """One request's, as far as it is known."""

    num_prompt: int
    started_s: float | None = None
    num_tokens: int | None = None
    """Once it is complete."""
    is_over: bool = False


class Answers:
    """Of one tier, by arrival."""

    def __init__(self) -> None:
        self._last: deque[Answer] = deque(maxlen=MAX_REMEMBERED)
        self._token_s = 0.0
        """Seconds of an answer per token, prompt included; 0: not known."""
        self._bound = 0.0

    def arrived(self, answer: Answer, max_tokens: int) -> None:
        self._last.append(answer)
        self._bound = max(self._bound, max_tokens)

    def complete(self, answer: Answer, at_s: float, num_tokens: int) -> None:
        answer.num_tokens, answer.is_over = num_tokens, True
        if answer.started_s is not None and num_tokens:
            token_s = (at_s - answer.started_s) / num_tokens
            weight = LEARNT if self._token_s else 1.0
            self._token_s += weight * (token_s - self._token_s)

    def mean_tokens(self, now: float) -> float:
        known = [answer.num_tokens for answer in self._last if answer.num_tokens is not None]
        if not known:
            return min(USUAL_TOKENS, self._bound or USUAL_TOKENS)
        running_s = sum(
            now - answer.started_s
            for answer in self._last
            if not answer.is_over and answer.started_s is not None
        )
        so_far = running_s / self._token_s if self._token_s else 0.0
        return min((sum(known) + so_far) / len(known), max(self._bound, *known))
