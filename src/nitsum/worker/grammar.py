"""Answers that follow a grammar: which tokens may come next, asked of llguidance.

What a grammar allows is a function of the answer so far, and the row has it: a matcher here is a
cache of what its slot's row says. It is brought up to date from the row before each draw and made
anew when the row tells another story (another request, a move, a replay). So nothing of it has to
travel, and the engine runs one step ahead as always. CPU ranks read rows where they lie; how GPU
ranks come to know theirs is in `cuda.grammar`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nitsum.errors import MissingDependency
from nitsum.request import SamplingParams
from nitsum.worker.slots import Draw

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer


Masks = npt.NDArray[np.int32]
"""[n, words]: one bit a token, 1 if it may come next; token t is bit t % 32 of word t // 32."""

MAX_THREADS = 8
"""That compute masks of one step side by side."""


class Answer(NamedTuple):
    """An answer as far as it goes, and what it has to keep to."""

    slot: int
    sampling: SamplingParams
    tokens: list[int]


@dataclass
class Matching:
    """How far one slot's answer is in its grammar."""

    grammar: str
    matcher: LLMatcher
    tokens: list[int] = field(default_factory=list[int])
    """The answer, as far as it is taken in."""
    ended: bool = False
    """A token ended the answer, or is none of the grammar's."""

    @property
    def open_ended(self) -> bool:
        """Something may come next that is not the end."""
        return not self.ended and not self.matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        return not self.open_ended or self.matcher.is_accepting()

    def follows(self, answer: Answer) -> bool:
        """Whether this is about the same answer, some tokens earlier."""
        taken = answer.tokens[: len(self.tokens)]
        return self.grammar == answer.sampling.grammar and taken == self.tokens

    def take(self, answer: Answer) -> None:
        """Take in what is new in `answer`."""
        for token in answer.tokens[len(self.tokens) :]:
            self.tokens.append(token)
            if not self.ended:
                stops = answer.sampling.stop_token_ids
                self.ended = token in stops or not self.matcher.consume_token(token)


class GrammarMasks:
    """The matchings of one rank's slots. Nothing is loaded before the first grammar comes, unless
    that is asked for."""

    def __init__(self, folder: Path, num_threads: int = 1) -> None:
        """`folder` is the checkpoint's: its `tokenizer.json` says what tokens spell. With several
        threads, masks of one call are computed side by side."""
        self._folder = folder
        self._num_threads = min(num_threads, MAX_THREADS)
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._matchings: dict[int, Matching] = {}

    def load_early(self) -> None:
        """Load now what the first grammar would wait for, where there can be grammars."""
        if find_spec("llguidance") is not None and self._path.is_file():
            self._load()

    def forbid(self, row: torch.Tensor, draw: Draw) -> None:
        """Set logits [V] of tokens that must not come next to -inf, in place."""
        row[~self.allowed(draw, len(row))] = -torch.inf

    def allowed(self, draw: Draw, vocab_size: int) -> torch.Tensor:
        """[V] bool. Stop tokens are allowed where the answer may end, and nowhere else."""
        answer = Answer(draw.slot, draw.sampling, draw.row[draw.num_prompt :].tolist())
        masks = np.zeros((1, num_words(vocab_size)), dtype=np.int32)
        self.fill(masks, [answer])
        bits = np.unpackbits(masks.view(np.uint8), bitorder="little")[:vocab_size]
        return torch.from_numpy(bits).bool()

    def fill(self, masks: Masks, answers: Sequence[Answer]) -> None:
        """Write what may come next in each answer into its line of `masks`."""
        matchings = [self._matching(answer) for answer in answers]
        found = self._compute([matching.matcher for matching in matchings if matching.open_ended])
        width = min(found.shape[1], masks.shape[1])
        masks[:] = 0
        masks[[m.open_ended for m in matchings], :width] = found[:, :width]
        for mask, matching, answer in zip(masks, matchings, answers, strict=True):
            _set_bits(mask, self._load().eos_tokens, allowed=False)
            if matching.may_end:
                _set_bits(mask, answer.sampling.stop_token_ids, allowed=True)

    def _compute(self, matchers: list[LLMatcher]) -> Masks:
        """[matchers, words of the tokenizer]"""
        words = num_words(self._load().vocab_size)
        masks = np.zeros((len(matchers), words), dtype=np.int32)
        if len(matchers) < 2 or self._num_threads == 1:
            for mask, matcher in zip(masks, matchers, strict=True):
                mask[:] = np.frombuffer(matcher.compute_bitmask(), np.int32)[:words]
            return masks
        places = [(matcher, place) for place, matcher in enumerate(matchers)]
        self._threads().unsafe_compute_mask_ptr(places, masks.ctypes.data, 4 * words, len(matchers))
        return masks

    def _threads(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
        return self._executor

    def _matching(self, answer: Answer) -> Matching:
        matching = self._matchings.get(answer.slot)
        if matching is None or not matching.follows(answer):
            matching = self._matchings[answer.slot] = self._new(answer.sampling)
        matching.take(answer)
        return matching

    def _new(self, sampling: SamplingParams) -> Matching:
        tokenizer = self._load()
        from llguidance import LLMatcher

        assert sampling.grammar is not None
        matcher = LLMatcher(tokenizer, sampling.grammar, log_level=0)
        return Matching(sampling.grammar, matcher)

    def _load(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it; takes most of a second, once."""
        if self._tokenizer is None:
            if find_spec("llguidance") is None:
                raise MissingDependency("Grammars need llguidance: install nitsum[structured].")
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(str(self._path))
        return self._tokenizer

    @property
    def _path(self) -> Path:
        return self._folder / "tokenizer.json"


def num_words(vocab_size: int) -> int:
    """Of a mask."""
    return -(-vocab_size // 32)


def _set_bits(mask: Masks, tokens: Sequence[int], *, allowed: bool) -> None:
    """Tokens that the model does not have have no bit."""
    words = mask.view(np.uint32)
    for token in tokens:
        if 0 <= token < 32 * len(words):
            bit = np.uint32(1 << token % 32)
            words[token // 32] = words[token // 32] | bit if allowed else words[token // 32] & ~bit
