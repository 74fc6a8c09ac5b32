"""Completions, whole and streamed, with and without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitsum.server.completions import split_prompts
from tests.server.server_kit import Bench, error_of, events_of, joined_text, make_checkpoint


def test_a_whole_completion(bench: Bench) -> None:
    body = bench.says("Hello world").complete("the quick").json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["prompt_tokens"] == len(bench.sent.prompt)
    assert bench.sent.sampling.max_tokens == 16


def test_a_stream(bench: Bench) -> None:
    bench.says("Hello world")
    chunks = events_of(bench.complete(stream=True, stream_options={"include_usage": True}))
    assert joined_text(chunks) == "Hello world"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(bench.ids("Hello world")) + 1


def test_prompts_times_n_in_order(bench: Bench) -> None:
    bench.engine.script = lambda request: request.prompt
    body = bench.complete(["one", "two"], n=2, max_tokens=50).json()
    assert [choice["text"] for choice in body["choices"]] == ["one", "one", "two", "two"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == len(bench.ids("one")) + len(bench.ids("two"))


@pytest.mark.parametrize("prompt", [[10, 11, 12], [[10, 11], [12]]])
def test_prompts_of_token_ids(bench: Bench, prompt: list[int] | list[list[int]]) -> None:
    assert bench.says("x").complete(prompt).status_code == 200
    sent = [request.prompt for request in bench.engine.requests]
    assert sent == (prompt if isinstance(prompt[0], list) else [prompt])


@pytest.mark.parametrize("prompt", ["", [], None])
def test_an_empty_prompt_is_the_begin_token(bench: Bench, prompt: object) -> None:
    assert bench.says("x").complete(prompt).status_code == 200
    assert bench.sent.prompt == [bench.codec.bos_id]


def test_an_empty_prompt_without_begin_token_is_refused(tmp_path: Path) -> None:
    bench = Bench(make_checkpoint(tmp_path / "m", bos=False))
    error = error_of(bench.complete(""))
    assert error["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_echo(bench: Bench, stream: bool) -> None:
    bench.says(" world")
    response = bench.complete(["Hello", "hello"], echo=True, stream=stream)
    choices = events_of(response) if stream else [response.json()]
    assert joined_text(choices, 0) == "Hello world"
    assert joined_text(choices, 1) == "hello world"


def test_echo_of_ids(bench: Bench) -> None:
    bench.says("x")
    body = bench.complete(bench.ids("Hello 🦊"), echo=True).json()
    assert body["choices"][0]["text"] == "Hello 🦊x"


def test_logprobs_of_completions(bench: Bench) -> None:
    found = bench.says("Hello 🦊!").complete(logprobs=2).json()["choices"][0]["logprobs"]
    ids = bench.ids("Hello 🦊!")
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(ids)
    assert found["tokens"][-1] == "!"
    assert any(token.startswith("bytes:\\x") for token in found["tokens"])
    assert found["text_offset"][0] == 0
    assert found["text_offset"][-1] == len("Hello 🦊")
    assert all(len(top) == 2 for top in found["top_logprobs"])
    for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert top[token] == -0.25


def test_logprobs_zero_has_no_alternatives(bench: Bench) -> None:
    found = bench.says("Hello").complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"] is None
    assert set(found["token_logprobs"]) == {-0.25}


def test_split_prompts() -> None:
    assert split_prompts("a") == ["a"]
    assert split_prompts(["a", "b"]) == ["a", "b"]
    assert split_prompts([1, 2]) == [[1, 2]]
    assert split_prompts([[1], [2]]) == [[1], [2]]


# --- without a tokenizer ------------------------------------------------------------------------


@pytest.fixture
def ids_only(tmp_path: Path) -> Bench:
    folder = make_checkpoint(tmp_path / "ids", tokenizer=False, template=None)
    bench = Bench(folder, eos_token_ids=(2,), bos_token_id=1)
    bench.engine.script = lambda request: [7, 8, 2]
    return bench


def test_ids_in_ids_out(ids_only: Bench) -> None:
    (choice,) = ids_only.complete([5, 6]).json()["choices"]
    assert choice["text"] == "7 8"
    assert choice["token_ids"] == [7, 8]
    assert choice["finish_reason"] == "stop"
    assert ids_only.sent.prompt == [5, 6]


def test_ids_streamed(ids_only: Bench) -> None:
    chunks = events_of(ids_only.complete([[5], [6]], stream=True))
    for index in (0, 1):
        assert joined_text(chunks, index) == "7 8"
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [token for choice in mine for token in choice["token_ids"]] == [7, 8]


def test_without_tokenizer_text_is_refused(ids_only: Bench) -> None:
    assert error_of(ids_only.complete("text"))["param"] == "prompt"
    assert error_of(ids_only.complete([1], stop="x"))["param"] == "stop"
    response = ids_only.chat("hi")
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages"
    assert "no tokenizer" in error_of(response)["message"]
    assert ids_only.post("/tokenize", {"prompt": "x"}).status_code == 400
    assert ids_only.engine.requests == []
