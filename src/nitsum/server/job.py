"""One call to a completion endpoint: its answers, and what is known of how they are served."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nitsum.messages import Output
from nitsum.server.answer import Answer
from nitsum.server.caller import Caller, now_s
from nitsum.server.metrics import Watch
from nitsum.server.shapes import PromptTokensDetails, Usage
from nitsum.tier import TierSet


@dataclass
class Job:
    """One call: its answers, and what is known of how they are served."""

    id: str
    model: str
    caller: Caller
    answers: list[Answer]
    tiers: TierSet
    num_copies: int = 1
    """Answers to each prompt; `answers` has those of the first prompt first."""
    created: int = field(default_factory=lambda: int(time.time()))
    first_output: Output | None = None
    watches: list[Watch] = field(default_factory=list["Watch"])
    """Times of its engine requests, of those that have begun."""

    @property
    def tier(self) -> str:
        """The least urgent tier any of its answers is served as."""
        return max((a.tier for a in self.answers), key=lambda name: self.tiers[name].level)

    def usage(self) -> Usage:
        """Tokens so far. A prompt with several answers counts once, as cached for the first."""
        if len(self.answers) == 1:  # asked for with every token
            (only,) = self.answers
            num_prompt = len(only.request.prompt)
            num_output, num_cached = only.num_tokens, only.num_cached
        else:
            firsts = self.answers[:: self.num_copies]
            num_prompt = sum(len(answer.request.prompt) for answer in firsts)
            num_output = sum(answer.num_tokens for answer in self.answers)
            num_cached = sum(answer.num_cached for answer in firsts)
        details = PromptTokensDetails(num_cached)
        return Usage(num_prompt, num_output, num_prompt + num_output, details)

    @property
    def reason(self) -> str | None:
        """Why it is not served as the tier it asked for: the key's ceiling, the engine's word."""
        told = self.first_output.reason if self.first_output is not None else None
        return "; ".join(text for text in (self.caller.reason, told) if text) or None

    @property
    def all_ended(self) -> bool:
        """Every answer came to its end."""
        return len(self.watches) == len(self.answers) and all(w.ended for w in self.watches)

    def met_targets(self) -> bool | None:
        """Whether every answer met its tier's targets; None when not all have ended."""
        return all(w.met for w in self.watches) if self.all_ended else None

    def ttft_s(self) -> float | None:
        """Arrival to first token; the latest of several answers."""
        return max((w.ttft_s for w in self.watches if w.ttft_s is not None), default=None)

    def tpot_s(self) -> float | None:
        """Mean time of later tokens; the slowest of several answers."""
        return max((w.tpot_s for w in self.watches if w.tpot_s is not None), default=None)

    def headers(self) -> dict[str, str]:
        """What the engine has said so far, for the response's head."""
        elapsed_ms = (now_s() - self.caller.arrival_s) * 1000
        headers = {"openai-processing-ms": str(round(elapsed_ms))}
        output = self.first_output
        if output is not None:
            headers["x-nitsum-queue-ms"] = str(round(output.queue_s * 1000))
            told = {"plan": output.plan, "lane": output.lane, "reason": self.reason}
            headers |= {
                f"x-nitsum-{name}": _header_text(text) for name, text in told.items() if text
            }
            if output.late:
                headers["x-nitsum-late"] = "true"
        return headers


def _header_text(text: str) -> str:
    return text.encode("ascii", "replace").decode().replace("\n", " ").replace("\r", " ")
