"""`response_format`, strict tools, forced calls: the grammar the engine gets, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.server.server_kit import Bench, error_of, make_checkpoint

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
STRICT = {
    "type": "function",
    "function": {"name": "f", "parameters": SCHEMA, "strict": True},
}
LOOSE = {"type": "function", "function": {"name": 'g "q"'}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 12}}\n</tool_call>'
WRONG = CALL.replace("12", "true")
OTHER = '<tool_call>\n{"name": "g \\"q\\"", "arguments": {"z": [1, 2]}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "f"}}

Matches = Callable[[str, str], bool]


@pytest.fixture(params=["marks are text", "one mark is a token", "both marks are tokens"])
def tool_checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "m")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    added = content["added_tokens"]
    if request.param == "marks are text":
        content["added_tokens"] = [t for t in added if t["content"] != "<tool_call>"]
    elif request.param == "both marks are tokens":
        last = max(token["id"] for token in added)
        added.append({**added[-1], "id": last + 1, "content": "</tool_call>"})
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def bench(tool_checkpoint: Path) -> Bench:
    return Bench(tool_checkpoint)


@pytest.fixture
def matches(tool_checkpoint: Path) -> Matches:
    """Whether a text is a whole answer under a grammar."""
    tokenizer = llguidance.LLTokenizer(str(tool_checkpoint / "tokenizer.json"))

    encode = Tokenizer.from_file(str(tool_checkpoint / "tokenizer.json")).encode

    def check(grammar: str, text: str) -> bool:
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        tokens = encode(text, add_special_tokens=False).ids
        return matcher.consume_tokens(tokens) and matcher.is_accepting()

    return check


def grammar_of(bench: Bench, **fields: Any) -> str:
    response = bench.says("x").chat(**fields)
    assert response.status_code == 200, response.text
    grammar = bench.sent.sampling.grammar
    assert grammar is not None
    return grammar


def test_a_schema(bench: Bench, matches: Matches) -> None:
    grammar = grammar_of(bench, response_format=FORMAT)
    assert matches(grammar, '{"x": -3}')
    for wrong in ("", '{"x": "a"}', '{"x": 1, "y": 2}', "{}", 'Sure! {"x": 1}', '{"x": 1'):
        assert not matches(grammar, wrong), wrong


def test_any_object(bench: Bench, matches: Matches) -> None:
    grammar = grammar_of(bench, response_format={"type": "json_object"})
    assert matches(grammar, '{"a": [1, {"b": null}], "ü": "x"}')
    assert not matches(grammar, "[1]")
    assert not matches(grammar, "hello")


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        (
            {"tools": [STRICT, LOOSE]},
            ["hello", CALL, "Let me see.\n" + CALL, f"{CALL}\n{OTHER}", OTHER],
            [WRONG, "text " + WRONG, CALL[:-3]],
        ),
        ({"tools": [STRICT], "parallel_tool_calls": False}, [CALL, "hi"], [f"{CALL}\n{CALL}"]),
        (
            {"tools": [STRICT, LOOSE], "tool_choice": "required"},
            [CALL, OTHER, f"{OTHER}\n{CALL}"],
            ["hello", WRONG, "x" + CALL],
        ),
        (
            {"tools": [STRICT, LOOSE], "tool_choice": NAMED, "parallel_tool_calls": False},
            [CALL],
            [OTHER, "hello", f"{CALL}\n{CALL}"],
        ),
        (
            {"tools": [STRICT], "response_format": FORMAT},
            [CALL, '{"x": 1}'],
            ["hello", WRONG, "{}"],
        ),
    ],
)
def test_tools(
    bench: Bench, matches: Matches, fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = grammar_of(bench, **fields)
    assert [text for text in good if not matches(grammar, text)] == []
    assert [text for text in bad if matches(grammar, text)] == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_a_tool_call(bench: Bench, stream: bool) -> None:
    response = bench.says(CALL).chat(tools=[STRICT], tool_choice="required", stream=stream)
    assert '"finish_reason":"tool_calls"' in response.text
    assert '"name":"f"' in response.text


def test_free_answers_have_no_grammar(bench: Bench) -> None:
    for fields in ({"response_format": {"type": "text"}}, {"tools": [LOOSE]}, {}):
        bench.says("x").chat(**fields)
        assert bench.engine.requests[-1].sampling.grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "string", "pattern": "(("}},
                }
            },
            "response_format",
        ),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": FORMAT, "min_tokens": 3}, "min_tokens"),
        ({"tools": [LOOSE], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [LOOSE], "tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
                ],
                "tool_choice": "required",
            },
            "tool_choice",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(bench: Bench, fields: dict[str, Any], param: str) -> None:
    response = bench.chat(**fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert bench.engine.requests == []


def test_a_schema_is_no_way_to_write_grammar(bench: Bench, matches: Matches) -> None:
    """What a caller writes stays inside its JSON."""
    name = 'x"} "anything" /.*/ {'
    schema = {"type": "object", "properties": {name: {"const": '"\nstart: /.*/\n'}}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    grammar = grammar_of(bench, response_format=wanted)
    assert not matches(grammar, "anything")
    assert matches(grammar, "{}")


def test_servers_that_cannot_say_why(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitsum.server.structured.find_spec", lambda name: None)
    error = error_of(Bench(checkpoint).chat(response_format=FORMAT))
    assert (error["param"], error["code"]) == ("response_format", "unsupported_parameter")
    assert "nitsum[structured]" in error["message"]
