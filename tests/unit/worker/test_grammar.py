"""Grammar masks on random logits: whatever the model would say, the answer follows the schema."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from nitsum.request import SamplingParams
from nitsum.worker.grammar import Answer, GrammarMasks
from nitsum.worker.sampler import sample
from nitsum.worker.slots import Draw
from tests.server.server_kit import byte_level_bpe

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")

VOCAB = 448
"""More than the tokenizer has: models pad."""
PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size", "count"],
    "additionalProperties": False,
}
TIGHT = {"whitespace_flexible": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_bpe()


@pytest.fixture
def masks(tokenizer: Tokenizer, tmp_path: Path) -> GrammarMasks:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return GrammarMasks(tmp_path)


@pytest.fixture
def params(tokenizer: Tokenizer) -> SamplingParams:
    end = tokenizer.token_to_id("<|im_end|>")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides=TIGHT)
    return SamplingParams(temperature=1.0, stop_token_ids=(end,), grammar=grammar)


def step(masks: GrammarMasks, row: list[int], params: SamplingParams, slot: int = 0) -> int:
    """Draw behind `row` from logits that know nothing of the grammar."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(len(row))) * 3
    draw = Draw(params, torch.tensor(row, dtype=torch.int32), len(PROMPT), None, slot)
    return sample(logits, [draw], masks).tokens[0]


def answer(masks: GrammarMasks, params: SamplingParams, slot: int = 0) -> list[int]:
    row = list(PROMPT)
    while row[-1] not in params.stop_token_ids:
        row.append(step(masks, row, params, slot))
        assert len(row) < 300
    return row[len(PROMPT) :]


def seeded(params: SamplingParams, seed: int, **changes: object) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, "seed": seed, **changes})  # type: ignore[arg-type]


def parsed(tokenizer: Tokenizer, tokens: list[int]) -> dict[str, object]:
    """The object, checked against the schema by hand."""
    found = json.loads(tokenizer.decode(tokens[:-1]))
    assert set(found) == {"name", "size", "count"}
    assert len(found["name"]) <= 6
    assert found["size"] in ("small", "large")
    assert 0 <= found["count"] <= 99
    return found


def test_random_logits_make_valid_json(
    tokenizer: Tokenizer, masks: GrammarMasks, params: SamplingParams
) -> None:
    found = [parsed(tokenizer, answer(masks, seeded(params, s), slot=s % 3)) for s in range(12)]
    assert len({json.dumps(one) for one in found}) > 6, "the sampling is still random"


def test_greedy_and_penalized_answers_follow_it_too(
    tokenizer: Tokenizer, masks: GrammarMasks, params: SamplingParams
) -> None:
    parsed(tokenizer, answer(masks, seeded(params, 1, temperature=0.0)))
    bias = dict.fromkeys(range(40, 60), 100.0)
    parsed(tokenizer, answer(masks, seeded(params, 2, logit_bias=bias, frequency_penalty=2.0)))


def test_the_row_is_the_whole_state(masks: GrammarMasks, params: SamplingParams) -> None:
    """A move, a replay, another slot, other requests in between: the tokens stay the same."""
    expected = answer(masks, params)
    fresh = GrammarMasks(masks._folder)
    for cut in range(0, len(expected), 3):
        row = PROMPT + expected[:cut]
        assert step(fresh, row, params, slot=cut % 4) == expected[cut]
        step(fresh, PROMPT, seeded(params, 99), slot=cut % 4)


def test_draws_without_a_grammar_are_left_alone(
    masks: GrammarMasks, params: SamplingParams
) -> None:
    logits = torch.randn(2, VOCAB)
    row = torch.tensor(PROMPT, dtype=torch.int32)
    free = Draw(SamplingParams(temperature=0.0), row, len(PROMPT), None, 0)
    held = Draw(seeded(params, 0, temperature=0.0), row, len(PROMPT), None, 1)
    tokens = sample(logits, [free, held], masks).tokens
    assert tokens[0] == int(logits[0].argmax())
    forced = held._replace(known=3)
    assert sample(logits[:1], [forced], masks).tokens == [3]


def test_behind_the_end_nothing_but_the_end_is_drawn(
    tokenizer: Tokenizer, masks: GrammarMasks, params: SamplingParams
) -> None:
    """The engine runs a step ahead of what it knows, so a draw behind the end happens."""
    done = answer(masks, params)
    assert step(masks, PROMPT + done, params) == params.stop_token_ids[0]
    wrong = tokenizer.encode("no JSON", add_special_tokens=False).ids
    assert step(masks, PROMPT + wrong, params) == params.stop_token_ids[0]


def test_an_answer_does_not_end_early(
    tokenizer: Tokenizer, masks: GrammarMasks, params: SamplingParams
) -> None:
    (end,) = params.stop_token_ids
    row = PROMPT + tokenizer.encode('{"name"', add_special_tokens=False).ids
    draw = Draw(params, torch.tensor(row, dtype=torch.int32), len(PROMPT), None, 0)
    allowed = masks.allowed(draw, VOCAB)
    assert allowed.shape == (VOCAB,)
    assert allowed.any()
    assert not allowed[end]
    assert not allowed[tokenizer.get_vocab_size() :].any()


def test_nothing_is_loaded_without_a_grammar(tmp_path: Path) -> None:
    masks = GrammarMasks(tmp_path / "no such folder")
    draw = Draw(SamplingParams(), torch.tensor(PROMPT, dtype=torch.int32), 3, None, 0)
    assert len(sample(torch.randn(1, VOCAB), [draw], masks).tokens) == 1


@pytest.mark.parametrize("num_threads", [1, 2])
def test_vocabularies_that_fill_their_last_word(
    tokenizer: Tokenizer, tmp_path: Path, params: SamplingParams, num_threads: int
) -> None:
    """llguidance keeps a bit more than there are tokens."""
    full = Tokenizer.from_str(tokenizer.to_str())
    full.add_tokens([f"<extra{i}>" for i in range(-full.get_vocab_size() % 32)])
    size = full.get_vocab_size()
    assert size % 32 == 0
    full.save(str(tmp_path / "tokenizer.json"))
    masks = GrammarMasks(tmp_path, num_threads)
    bits = np.zeros((2, size // 32), dtype=np.int32)
    masks.fill(bits, [Answer(slot, params, []) for slot in range(2)])
    brace = full.encode("{", add_special_tokens=False).ids[0]
    for line in bits.view(np.uint32):
        assert line[brace // 32] >> brace % 32 & 1
        assert not line[size // 32 - 1] >> 31
