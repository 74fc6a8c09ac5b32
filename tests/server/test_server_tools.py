"""Tool calls in answers, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.server.shapes import ToolCall
from nitsum.server.tools import ToolCallParser
from tests.server.server_kit import Bench, error_of, events_of, joined_text, make_checkpoint

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {}}}
    for name in ("get_weather", "get_time")
]
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
LLAMA = '{"name": "get_weather", "parameters": {"city": "Köln"}}'

Found = tuple[str | None, list[tuple[str, Any]], str]

CASES: list[tuple[str, Found]] = [
    (HERMES, (None, [("get_weather", {"city": "Köln"})], "tool_calls")),
    (
        "I look. \n" + HERMES + "\n" + SECOND,
        ("I look.", [("get_weather", {"city": "Köln"}), ("get_time", {})], "tool_calls"),
    ),
    (
        HERMES.removesuffix("</tool_call>"),
        (None, [("get_weather", {"city": "Köln"})], "tool_calls"),
    ),
    (LLAMA, (None, [("get_weather", {"city": "Köln"})], "tool_calls")),
    (
        LLAMA + "; " + LLAMA,
        (None, [("get_weather", {"city": "Köln"})] * 2, "tool_calls"),
    ),
    (
        '{"name": "get_time", "arguments": "{\\"a\\": 1}"}',
        (None, [("get_time", {"a": 1})], "tool_calls"),
    ),
    (
        '{"name": "unknown", "parameters": {}}',
        ('{"name": "unknown", "parameters": {}}', [], "stop"),
    ),
    ('{"answer": 42}', ('{"answer": 42}', [], "stop")),
    ("{not json", ("{not json", [], "stop")),
    (LLAMA + " and text", (LLAMA + " and text", [], "stop")),
    ("<tool_call>oops</tool_call>", ("<tool_call>oops</tool_call>", [], "stop")),
    ("just <b>text</b> with <tool", ("just <b>text</b> with <tool", [], "stop")),
    ("text \n", ("text \n", [], "stop")),
]


def whole(bench: Bench, **fields: Any) -> Found:
    choice = bench.chat(tools=TOOLS, **fields).json()["choices"][0]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["type"] == "function" for call in calls)
    named = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
    return message["content"], named, choice["finish_reason"]


def streamed(bench: Bench, **fields: Any) -> Found:
    chunks = events_of(bench.chat(tools=TOOLS, stream=True, **fields))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    named = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
    text = joined_text(chunks)
    finish = chunks[-1]["choices"][0]["finish_reason"]
    return (text or None) if calls else text, named, finish


@pytest.mark.parametrize(("text", "expected"), CASES, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("size", [1, 1000])
def test_calls_are_found(checkpoint: Path, text: str, expected: Found, size: int) -> None:
    bench = Bench(checkpoint, FakeEngineClient(tokens_per_output=size)).says(text)
    assert whole(bench) == expected
    assert streamed(bench) == expected


def test_only_one_call_when_not_parallel(bench: Bench) -> None:
    bench.says(HERMES + SECOND)
    expected = (None, [("get_weather", {"city": "Köln"})], "tool_calls")
    assert whole(bench, parallel_tool_calls=False) == expected
    assert bench.engine.aborted == [bench.sent.request_id]
    assert streamed(bench, parallel_tool_calls=False) == expected


def test_a_call_cut_by_length_is_text(bench: Bench) -> None:
    text, calls, finish = whole(bench.says(HERMES), max_tokens=12)
    assert (calls, finish) == ([], "length")
    assert text is not None
    assert HERMES.startswith(text)


def test_the_template_gets_the_tools(bench: Bench) -> None:
    whole(bench.says("x"))
    assert json.dumps(TOOLS) in bench.codec.decode(bench.sent.prompt)


def test_tool_choice_none_leaves_tools_out(bench: Bench) -> None:
    assert whole(bench.says(HERMES), tool_choice="none") == (HERMES, [], "stop")
    assert "get_weather" not in bench.codec.decode(bench.sent.prompt)


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    bench = Bench(make_checkpoint(tmp_path / "m", template="{{ messages[0].content }}"))
    assert error_of(bench.chat(tools=TOOLS))["param"] == "tools"


@settings(max_examples=200, deadline=None)
@given(data=st.data(), text=st.sampled_from([case[0] for case in CASES] + [HERMES + "x" + LLAMA]))
def test_parts_do_not_depend_on_where_text_is_cut(data: st.DataObject, text: str) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(pieces) == parsed([text])


def parsed(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser({"get_weather", "get_time"})
    parts = [part for piece in pieces for part in parser.add(piece)] + parser.flush()
    calls = [part.function for part in parts if isinstance(part, ToolCall)]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [(call.name, call.arguments) for call in calls]
