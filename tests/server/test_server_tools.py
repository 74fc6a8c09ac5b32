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


CUT: list[tuple[str, tuple[str | None, list[tuple[str, str]]]]] = [
    ("<tool_call>", ("<tool_call>", [])),
    ('<tool_call>{"name": "get_wea', ('<tool_call>{"name": "get_wea', [])),
    ('<tool_call>{"name": "unknown", "a', ('<tool_call>{"name": "unknown", "a', [])),
    ('<tool_call>{"name": "get_time"', (None, [("get_time", "")])),
    ('<tool_call>{"name": "get_time", "argum', (None, [("get_time", "")])),
    ('<tool_call>{"name": "get_time", "arguments": ', (None, [("get_time", "")])),
    (
        'I look. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Kö',
        ("I look.", [("get_weather", '{"city": "Kö')]),
    ),
    ('<tool_call>{"name": "get_time", "arguments": {"a": "<', (None, [("get_time", '{"a": "<')])),
    ('<tool_call>{"name":"get_time","arguments":{"a":1}', (None, [("get_time", '{"a": 1}')])),
    (HERMES.removesuffix("call>"), (None, [("get_weather", '{"city": "Köln"}')])),
    (
        SECOND + '<tool_call>{"name": "get_weather", "arguments": {"ci',
        (None, [("get_time", "{}"), ("get_weather", '{"ci')]),
    ),
    ('{"name": "get_time", "parameters": {"a": [1, ', (None, [("get_time", '{"a": [1, ')])),
    (
        LLAMA + '; {"name": "get_time", "parameters": {',
        (None, [("get_weather", '{"city": "Köln"}'), ("get_time", "{")]),
    ),
    ('{"name": "get_time", "note": "no', ('{"name": "get_time", "note": "no', [])),
    ('{"name": "Jo', ('{"name": "Jo', [])),
]


def cut_off(bench: Bench, text: str, *, stream: bool) -> tuple[str | None, list[tuple[str, str]]]:
    """Content and calls of an answer that is `text` and would go on."""
    bench.says(text + "    x" * 50)
    answer = bench.chat(tools=TOOLS, max_tokens=len(bench.ids(text)), stream=stream)
    if not stream:
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        message = choice["message"]
        return message["content"], _named(message.get("tool_calls", []))
    chunks = events_of(answer)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    return joined_text(chunks) or None, _named(calls)


def _named(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    assert all(call["id"] and call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize(("text", "expected"), CUT, ids=lambda v: str(v)[-30:])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_by_length_has_its_arguments_so_far(
    bench: Bench, text: str, expected: tuple[str | None, list[tuple[str, str]]], stream: bool
) -> None:
    assert cut_off(bench, text, stream=stream) == expected


@pytest.mark.parametrize("text", [CUT[3][0], CUT[11][0]])
def test_what_is_no_whole_call_stays_text_when_the_model_ends_it(bench: Bench, text: str) -> None:
    assert whole(bench.says(text)) == (text, [], "stop")


def test_the_template_gets_the_tools(bench: Bench) -> None:
    whole(bench.says("x"))
    assert json.dumps(TOOLS) in bench.codec.decode(bench.sent.prompt)


def test_tool_choice_none_leaves_tools_out(bench: Bench) -> None:
    assert whole(bench.says(HERMES), tool_choice="none") == (HERMES, [], "stop")
    assert "get_weather" not in bench.codec.decode(bench.sent.prompt)


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    bench = Bench(make_checkpoint(tmp_path / "m", template="{{ messages[0].content }}"))
    assert error_of(bench.chat(tools=TOOLS))["param"] == "tools"


TEXTS = [case[0] for case in CASES] + [case[0] for case in CUT] + [HERMES + "x" + LLAMA]


@settings(max_examples=200)
@given(data=st.data(), text=st.sampled_from(TEXTS))
def test_parts_do_not_depend_on_where_text_is_cut(data: st.DataObject, text: str) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    cut = data.draw(st.booleans())
    assert parsed(pieces, cut=cut) == parsed([text], cut=cut)


def parsed(pieces: list[str], *, cut: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser({"get_weather", "get_time"})
    parts = [part for piece in pieces for part in parser.add(piece)] + parser.flush(cut=cut)
    calls = [part.function for part in parts if isinstance(part, ToolCall)]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [(call.name, call.arguments) for call in calls]
