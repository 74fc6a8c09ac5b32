"""Answers under grammars on a GPU rank: drawn from masked logits, as CPU ranks draw them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nitsum.messages import Join, Pages, Work
from nitsum.request import SamplingParams
from nitsum.worker.cuda.grammar import DeviceGrammars
from nitsum.worker.grammar import Answer, GrammarMasks
from nitsum.worker.sampler import sample
from nitsum.worker.slots import Draw
from tests.checkpoints import write_checkpoint
from tests.server.server_kit import byte_level_bpe
from tests.unit.worker.cuda.kit import ROW_TOKENS, Rank

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")

PROMPT = [5, 77, 130]
HELD, FREE = 2, 5
"""Slots: of a request with a grammar, and of one without."""
SCHEMA = {"type": "array", "items": {"enum": [1, 22]}, "minItems": 1, "maxItems": 2}
VOCAB = 448
NUM_STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama", num_hidden_layers=1, vocab_size=VOCAB)
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    return folder


def params(**changes: object) -> SamplingParams:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        SCHEMA, overrides={"whitespace_flexible": False}
    )
    fields = {"temperature": 1.0, "seed": 3, "stop_token_ids": (2,), "grammar": grammar}
    return SamplingParams(**(fields | changes))  # type: ignore[arg-type]


def begin(rank: Rank, slot: int, tokens: list[int], sampling: SamplingParams) -> torch.Tensor:
    """Prompt and answer so far of a slot of pages of its own; draws behind them."""
    pages = [i + 1 + (slot == FREE) * 25 for i in range(ROW_TOKENS // 4)]
    join = Join(slot, tokens, len(PROMPT), len(tokens), sampling)
    for start in range(0, len(tokens) - 1, 15):
        count = min(15, len(tokens) - 1 - start)
        rank.step([Work(slot, start, count, False)], [join], [Pages(slot, 0, [pages])])
    return rank.step([Work(slot, len(tokens) - 1, 1, True)], [], [])


def answer_of(rank: Rank, num_tokens: int) -> str:
    tokens = rank.row(len(PROMPT) + num_tokens, HELD)[len(PROMPT) :]
    assert 2 in tokens, "the answer has not ended"
    return byte_level_bpe().decode(tokens[: tokens.index(2)])


def check(text: str) -> None:
    found = json.loads(text)
    assert len(found) in (1, 2)
    assert set(found) <= {1, 22}


def test_draws_are_those_of_cpu_ranks(folder: Path) -> None:
    """From the same logits, beside a request without a grammar that is not disturbed."""
    rank, masks, sampling = Rank(folder), GrammarMasks(folder), params(frequency_penalty=0.5)
    free = SamplingParams(temperature=0.0)
    begin(rank, FREE, PROMPT, free)
    raw = begin(rank, HELD, PROMPT, sampling)
    for position in range(len(PROMPT), len(PROMPT) + NUM_STEPS):
        row = torch.tensor(rank.row(position + 1, HELD), dtype=torch.int32)
        draw = Draw(sampling, row[:position], len(PROMPT), None, HELD)
        assert sample(raw, [draw], masks).tokens == [int(row[position])]
        work = [Work(FREE, position, 1, True), Work(HELD, position, 1, True)]
        both = rank.step(work, [], [])
        assert rank.row(position + 2, FREE)[-1] == int(both[0].argmax())
        raw = both[1:]
    check(answer_of(rank, NUM_STEPS))


def test_an_answer_that_arrives_in_a_row_is_read_from_it(folder: Path) -> None:
    """After a move the join brings no tokens: the row has them, and they are not all known."""
    rank, sampling = Rank(folder), params()
    begin(rank, HELD, PROMPT, sampling)
    for position in range(len(PROMPT), len(PROMPT) + 3):
        rank.step([Work(HELD, position, 1, True)], [], [])
    join = Join(HELD, [], len(PROMPT), len(PROMPT) + 2, sampling)
    rank.step([Work(HELD, len(PROMPT) + 3, 1, True)], [join], [])
    for position in range(len(PROMPT) + 4, len(PROMPT) + NUM_STEPS):
        rank.step([Work(HELD, position, 1, True)], [], [])
    check(answer_of(rank, NUM_STEPS))


def test_given_tokens_are_not_masked(folder: Path) -> None:
    rank = Rank(folder)
    join = Join(HELD, [*PROMPT, 7, 8], len(PROMPT), len(PROMPT) + 2, params())
    rank.grammars.join([join])
    assert rank.grammars.read([Work(HELD, 0, 3, True)]) is None
    assert rank.grammars.read([Work(HELD, 3, 1, True)]) is None
    reading = rank.grammars.read([Work(HELD, 3, 1, False), Work(HELD, 4, 1, True)])
    assert reading is not None
    assert [(draw.row, draw.num_new) for draw in reading.draws] == [(0, 2)]


def test_a_slot_that_another_request_takes_is_free(folder: Path) -> None:
    rank = Rank(folder)
    rank.grammars.join([Join(HELD, PROMPT, 3, 3, params())])
    assert rank.grammars.read([Work(HELD, 0, 3, True)]) is not None
    rank.grammars.join([Join(HELD, PROMPT, 3, 3, SamplingParams())])
    assert rank.grammars.read([Work(HELD, 0, 3, True)]) is None


def test_masks_computed_side_by_side_are_those_computed_alone(folder: Path) -> None:
    alone, together = GrammarMasks(folder), GrammarMasks(folder, num_threads=2)
    texts = ("", "[1", "[1, 22]", "no JSON")
    encode = byte_level_bpe().encode
    answers = [Answer(i, params(), encode(text).ids) for i, text in enumerate(texts)]
    found = np.full((len(answers), VOCAB // 32), -1, dtype=np.int32)
    together.fill(found, answers)
    for line, answer in zip(found, answers, strict=True):
        expected = np.empty((1, VOCAB // 32), dtype=np.int32)
        alone.fill(expected, [answer])
        assert np.array_equal(line, expected[0])
        assert line.any()


def test_warming_up_changes_no_logits(folder: Path) -> None:
    rank = Rank(folder)
    logits = torch.randn(2, VOCAB, device=rank.state.rows.device)
    before = logits.clone()
    rank.grammars.warm_up(logits)
    assert torch.equal(logits, before)


def test_without_a_tokenizer_there_is_nothing_to_load(tmp_path: Path) -> None:
    GrammarMasks(tmp_path).load_early()
    rows = torch.zeros(4, 8, dtype=torch.int32)
    assert DeviceGrammars(rows, GrammarMasks(tmp_path), 16).read([Work(0, 0, 1, True)]) is None
