"""Answers that follow a grammar: which tokens may come next, asked of llguidance.

What a grammar allows is a function of the answer so far, and the row has it: a matcher here is a
cache of what its slot's row says. It is brought up to date from the row before each draw and made
anew when the row tells another story (another request, a move, a replay). So nothing of it has to
travel, and the engine runs one step ahead as always.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nitsum.errors import MissingDependency
from nitsum.worker.slots import Draw

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


@dataclass
class Matching:
    """How far one slot's answer is in its grammar."""

    grammar: str
    matcher: LLMatcher
    tokens: list[int] = field(default_factory=list[int])
    """The answer, as far as it is taken in."""
    ended: bool = False
    """A token ended the answer, or is none of the grammar's."""

    def follows(self, draw: Draw, answer: list[int]) -> bool:
        """Whether this is about the same answer, some tokens earlier."""
        return self.grammar == draw.sampling.grammar and answer[: len(self.tokens)] == self.tokens

    def take(self, answer: list[int], stops: tuple[int, ...]) -> None:
        """Take in what is new in `answer`."""
        for token in answer[len(self.tokens) :]:
            self.tokens.append(token)
            if not self.ended:
                self.ended = token in stops or not self.matcher.consume_token(token)


class GrammarMasks:
    """The matchings of one rank's slots. Nothing is loaded before the first grammar comes."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the checkpoint's: its `tokenizer.json` says what tokens spell."""
        self._folder = folder
        self._tokenizer: LLTokenizer | None = None
        self._matchings: dict[int, Matching] = {}

    def forbid(self, row: torch.Tensor, draw: Draw) -> None:
        """Set logits [V] of tokens that must not come next to -inf, in place."""
        row[~self.allowed(draw, len(row))] = -torch.inf

    def allowed(self, draw: Draw, vocab_size: int) -> torch.Tensor:
        """[V] bool. Stop tokens are allowed where the answer may end, and nowhere else."""
        matching = self._matching(draw)
        matcher = matching.matcher
        open_ended = not matching.ended and not matcher.is_stopped()
        found = _unpack(matcher.compute_bitmask() if open_ended else b"", vocab_size)
        found[_within(self._load().eos_tokens, vocab_size)] = False
        if not open_ended or matcher.is_accepting():
            found[_within(draw.sampling.stop_token_ids, vocab_size)] = True
        return found

    def _matching(self, draw: Draw) -> Matching:
        answer: list[int] = draw.row[draw.num_prompt :].tolist()
        matching = self._matchings.get(draw.slot)
        if matching is None or not matching.follows(draw, answer):
            matching = self._matchings[draw.slot] = self._new(draw)
        matching.take(answer, draw.sampling.stop_token_ids)
        return matching

    def _new(self, draw: Draw) -> Matching:
        tokenizer = self._load()
        from llguidance import LLMatcher

        assert draw.sampling.grammar is not None
        matcher = LLMatcher(tokenizer, draw.sampling.grammar, log_level=0)
        return Matching(draw.sampling.grammar, matcher)

    def _load(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it; takes most of a second, once."""
        if self._tokenizer is None:
            if find_spec("llguidance") is None:
                raise MissingDependency("Grammars need llguidance: install nitsum[structured].")
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(str(self._folder / "tokenizer.json"))
        return self._tokenizer


def _unpack(bits: bytes, vocab_size: int) -> torch.Tensor:
    """[V] bool from one bit a token; tokens behind the last bit are not allowed."""
    found = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[:vocab_size]
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[: len(found)] = torch.from_numpy(found).bool()
    return allowed


def _within(tokens: list[int] | tuple[int, ...], vocab_size: int) -> list[int]:
    return [token for token in tokens if 0 <= token < vocab_size]
