"""Chat completions, whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nitsum.engine.fake_client import FakeEngineClient
from tests.server.server_kit import (
    MAX_MODEL_LEN,
    MODEL,
    Bench,
    events_of,
    joined_text,
    make_checkpoint,
)


def test_a_whole_answer(bench: Bench) -> None:
    response = bench.says("Hello world").chat("hi", temperature=0)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert body["service_tier"] == "default"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    num_output = len(bench.ids("Hello world")) + 1
    assert body["usage"] == {
        "prompt_tokens": len(bench.sent.prompt),
        "completion_tokens": num_output,
        "total_tokens": len(bench.sent.prompt) + num_output,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_prompt_is_the_rendered_template(bench: Bench) -> None:
    bench.says("x").chat("hi")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert bench.codec.decode(bench.sent.prompt) == text


def test_defaults_reach_the_engine(bench: Bench) -> None:
    bench.says("x").chat("hi")
    sampling = bench.sent.sampling
    assert sampling.max_tokens == MAX_MODEL_LEN - len(bench.sent.prompt)
    assert sampling.stop_token_ids == (bench.codec.eos_id,)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.logprobs is None


def test_every_field_reaches_the_engine(bench: Bench) -> None:
    bench.says("x").chat(
        "hi",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=42,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=3,
        min_tokens=1,
        max_completion_tokens=9,
        stop_token_ids=[7],
        ignore_eos=True,
        priority=-3,
        user="u",
        metadata={"chain_id": "c1", "other": "x"},
        service_tier="fast",
    )
    request, sampling = bench.sent, bench.sent.sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (7, 0.1, 42)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
    assert sampling.repetition_penalty == 1.1
    assert sampling.logit_bias == {5: -100.0}
    assert (sampling.logprobs, sampling.min_tokens, sampling.max_tokens) == (3, 1, 9)
    assert sampling.stop_token_ids == (7,)
    assert (request.order, request.tenant, request.chain_id) == (-3, "u", "c1")
    assert (request.tier, request.tier_asked) == ("priority", "priority")


def test_seeds_differ_when_none_is_given(checkpoint: Path) -> None:
    seeds = set()
    for _ in range(2):
        bench = Bench(checkpoint)
        bench.says("x").chat(n=2)
        seeds |= {request.sampling.seed for request in bench.engine.requests}
    assert len(seeds) == 4


def test_n_answers_have_seeds_of_their_own_and_one_prompt(bench: Bench) -> None:
    answers = ["one", "two", "three"]
    bench.engine.script = lambda request: bench.ids(answers[int(request.request_id[-1])])
    body = bench.chat(n=3, seed=5).json()
    assert [c["message"]["content"] for c in body["choices"]] == answers
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    seeds = [request.sampling.seed for request in bench.engine.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert body["usage"]["prompt_tokens"] == len(bench.engine.requests[0].prompt)
    assert body["usage"]["completion_tokens"] == sum(len(bench.ids(a)) for a in answers)


def test_length_ends_an_answer(bench: Bench) -> None:
    choice = bench.says("Hello world, hello there!").chat(max_tokens=2).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == bench.codec.decode(bench.ids("Hello world, he")[:2])


def test_stream_has_role_text_finish_usage_done(bench: Bench) -> None:
    response = bench.says("Hello world").chat(stream=True, stream_options={"include_usage": True})
    chunks = events_of(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["service_tier"] for chunk in chunks} == {"default"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined_text(chunks) == "Hello world"
    assert chunks[-2]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(bench.ids("Hello world")) + 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    finishes = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert finishes.count(None) == len(finishes) - 1


def test_stream_without_usage_has_no_usage(bench: Bench) -> None:
    assert all("usage" not in chunk for chunk in events_of(bench.says("x").chat(stream=True)))


def test_continuous_usage_grows_to_the_total(bench: Bench) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(bench.says("Hello world").chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == len(bench.ids("Hello world")) + 1


def test_stream_of_n_is_merged_by_index(bench: Bench) -> None:
    answers = ["one two three", "four"]
    bench.engine.script = lambda request: bench.ids(answers[int(request.request_id[-1])])
    chunks = events_of(bench.chat(n=2, stream=True))
    for index, answer in enumerate(answers):
        assert joined_text(chunks, index) == answer
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [("STOP", "Hello "), (["zzz", "world"], "Hello STO "), (["ld", "STOP n"], "Hello STO wor")],
)
def test_stop_strings_across_tokens(
    checkpoint: Path, size: int, stream: bool, stop: Any, expected: str
) -> None:
    text = "Hello STO world STOP now" if stop != "STOP" else "Hello STOP STO now"
    bench = Bench(checkpoint, FakeEngineClient(tokens_per_output=size)).says(text)
    response = bench.chat(stop=stop, stream=stream)
    if stream:
        chunks = events_of(response)
        assert joined_text(chunks) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == expected
        assert choice["finish_reason"] == "stop"


def test_a_stop_string_aborts_the_engine_and_bills_no_more(bench: Bench) -> None:
    body = bench.says("Hello STOP " + "the quick " * 20).chat(stop="STOP").json()
    assert bench.engine.aborted == [bench.sent.request_id]
    assert body["usage"]["completion_tokens"] <= len(bench.ids("Hello STOP "))


def test_text_that_only_looks_like_a_stop_is_not_lost(bench: Bench) -> None:
    choice = bench.says("Hello STO").chat(stop="STOP").json()["choices"][0]
    assert choice["message"]["content"] == "Hello STO"


def test_min_tokens_holds_for_stop_strings(bench: Bench) -> None:
    text = "STOP the fox STOP over"
    after = len(bench.ids("STOP the"))
    choice = bench.says(text).chat(stop="STOP", min_tokens=after).json()["choices"][0]
    assert choice["message"]["content"] == "STOP the fox "


@pytest.mark.parametrize("size", [1, 2])
def test_emoji_split_over_tokens_arrive_whole(checkpoint: Path, size: int) -> None:
    text = "hello 👩‍🚀🦊 ünïcødé 漢字"
    bench = Bench(checkpoint, FakeEngineClient(tokens_per_output=size)).says(text)
    assert len(bench.ids("🦊")) > 1, "the test needs a character of several tokens"
    chunks = events_of(bench.chat(stream=True))
    assert joined_text(chunks) == text
    assert not any("\ufffd" in chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_logprobs_of_chat(bench: Bench) -> None:
    body = bench.says("Hello 🦊").chat(logprobs=True, top_logprobs=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    ids = bench.ids("Hello 🦊")
    assert len(content) == len(ids)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "Hello 🦊"
    assert all(entry["logprob"] == -0.25 for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]


def test_streamed_logprobs_are_the_same_and_end_at_the_stop(bench: Bench) -> None:
    bench.says("Hello STOP world")
    fields: dict[str, Any] = {"logprobs": True, "stop": " STOP"}
    whole = bench.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    chunks = events_of(bench.chat(stream=True, **fields))
    streamed = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == whole
    assert "".join(entry["token"] for entry in whole) == "Hello"


def test_content_parts_null_content_and_tool_history(bench: Bench) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "unknown": 1},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    response = bench.says("x").post("/v1/chat/completions", {"messages": messages})
    assert response.status_code == 200
    assert bench.codec.decode(bench.sent.prompt) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\na\nb<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_token_ids_on_request(bench: Bench) -> None:
    bench.says("Hello world")
    ids = bench.ids("Hello world")
    assert bench.chat(return_token_ids=True).json()["choices"][0]["token_ids"] == ids
    chunks = events_of(bench.chat(return_token_ids=True, stream=True))
    streamed = [t for c in chunks for t in c["choices"][0].get("token_ids", [])]
    assert streamed == ids


def test_long_prompts_are_tokenized_all_the_same(checkpoint: Path) -> None:
    bench = Bench(checkpoint, max_model_len=20_000).says("x")
    text = "the quick brown fox " * 1000
    assert bench.chat(text).status_code == 200
    assert text in bench.codec.decode(bench.sent.prompt)


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    bench = Bench(make_checkpoint(tmp_path / "plain", template=None))
    response = bench.chat()
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "/v1/completions" in response.json()["error"]["message"]
