"""Bad input is a 400 that names the field; the engine's errors keep their status and code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.messages import Output
from nitsum.request import Request
from tests.server.server_kit import MAX_MODEL_LEN, Bench, error_of, make_checkpoint

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": 10**400}, "temperature"),
    ({"stop_token_ids": [10**400]}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", 3]}, "stop[1]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {f"{token:05}": 1 for token in range(513)}}, "logit_bias"),
    ({"stop_token_ids": [1] * 49}, "stop_token_ids"),
    ({"logit_bias": {"1": "a"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"user": 5}, "user"),
    ({"metadata": {"chain_id": 5}}, "metadata"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"service_tier": 1}, "service_tier"),
    ({"priority": "high"}, "priority"),
    ({"priority": 2**40}, "priority"),
    ({"guided_json": {}}, "guided_json"),
    ({"cache_salt": "s"}, "cache_salt"),
    ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "max_completion_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
]

CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    (
        {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]},
        "messages[0].audio",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "user", "content": "x " * MAX_MODEL_LEN}]}, "messages"),
    ({"prompt": "x"}, "prompt"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}},
        "tool_choice",
    ),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"verbosity": "low"}, "verbosity"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]

COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70], "echo": True}, "prompt"),
    ({"prompt": [1] * MAX_MODEL_LEN}, "prompt"),
    ({"prompt": "x " * MAX_MODEL_LEN}, "prompt"),
    ({"prompt": "x" * 100_000}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"messages": MESSAGES}, "messages"),
    ({"tools": [TOOL]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
]

TOKENIZE: list[tuple[dict[str, Any], str]] = [
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ({"tools": [TOOL]}, "tools"),
    ({"prompt": "x"}, "prompt"),
]


def refused(bench: Bench, path: str, body: dict[str, Any], param: str) -> None:
    response = bench.post(path, body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert bench.engine.requests == []


@pytest.mark.parametrize(("fields", "param"), BOTH + CHAT_ONLY, ids=str)
def test_bad_fields_of_chat(bench: Bench, fields: dict[str, Any], param: str) -> None:
    refused(bench, "/v1/chat/completions", {"messages": MESSAGES, **fields}, param)


@pytest.mark.parametrize(("fields", "param"), TOKENIZE, ids=str)
def test_bad_fields_of_tokenize(bench: Bench, fields: dict[str, Any], param: str) -> None:
    refused(bench, "/tokenize", {"messages": MESSAGES, **fields}, param)


@pytest.mark.parametrize(("fields", "param"), BOTH + COMPLETION_ONLY, ids=lambda v: str(v)[:40])
def test_bad_fields_of_completions(bench: Bench, fields: dict[str, Any], param: str) -> None:
    refused(bench, "/v1/completions", {"prompt": "hi", **fields}, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}, "store": False, "functions": None, "tools": []},
        {"modalities": ["text"], "parallel_tool_calls": True, "stream_options": None},
        {"brand_new_field": {"x": 1}, "another": 5},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None},
        {"temperature": 0, "top_p": 1, "top_k": -1, "seed": -1, "prompt_cache_key": "k"},
    ],
)
def test_harmless_and_unknown_fields_are_tolerated(bench: Bench, fields: dict[str, Any]) -> None:
    assert bench.says("x").chat(**fields).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": NaN}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
    ],
)
def test_bodies_that_are_no_json_object(bench: Bench, body: bytes) -> None:
    response = bench.call("POST", "/v1/completions", content=body)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("text", ["\u0000", "\ufffd\uffff", "\U0010ffff", "a\u202eb", "\r\n\t"])
def test_odd_characters_are_text_like_any_other(bench: Bench, text: str) -> None:
    bench.engine.script = lambda request: request.prompt
    body = bench.complete(text, max_tokens=50).json()
    assert body["choices"][0]["text"] == text


def test_templates_refuse_in_their_own_words(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    bench = Bench(make_checkpoint(tmp_path / "m", template=template))
    error = error_of(bench.chat())
    assert error["param"] == "messages"
    assert "roles must alternate" in error["message"]


def test_unknown_model_route_and_method(bench: Bench) -> None:
    response = bench.complete(model="gpt-9")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert bench.says("x").complete(model="alias").status_code == 200
    assert bench.get("/v1/nothing").status_code == 404
    assert error_of(bench.get("/v1/nothing"))["type"] == "invalid_request_error"
    response = bench.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


def test_too_large_a_body(checkpoint: Path) -> None:
    bench = Bench(checkpoint, max_body_bytes=1000)
    response = bench.complete("x" * 2000)
    assert response.status_code == 413
    assert bench.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (429, "resource_unavailable", "rate_limit_error"),
        (429, "queue_timeout", "rate_limit_error"),
        (503, "server_is_overloaded", "server_error"),
        (500, None, "server_error"),
    ],
)
def test_refusals_of_the_engine(
    checkpoint: Path, stream: bool, n: int, status: int, code: str | None, kind: str
) -> None:
    def refuse(request: Request) -> Output:
        return Output(request.request_id, error="no room", error_status=status, error_code=code)

    bench = Bench(checkpoint, FakeEngineClient(refuse=refuse))
    response = bench.chat(stream=stream, n=n)
    assert response.status_code == status
    error = error_of(response)
    assert (error["message"], error["type"], error["code"]) == ("no room", kind, code)
    if status in (429, 503):
        assert 0 < float(response.headers["retry-after-ms"]) < 120_000
        assert 0 < int(response.headers["retry-after"]) < 120
    assert not bench.app.state.service.metrics.open


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_cut_by_the_engine_is_an_error(checkpoint: Path, reason: Any) -> None:
    bench = Bench(
        checkpoint,
        FakeEngineClient(refuse=lambda request: Output(request.request_id, [5], reason)),
    )
    response = bench.chat()
    assert response.status_code == 500
    assert "again" in error_of(response)["message"]


def test_one_failed_answer_of_two_fails_the_call_and_ends_the_other(checkpoint: Path) -> None:
    def refuse(request: Request) -> Output | None:
        if request.request_id.endswith("-1"):
            return Output(request.request_id, error="no", error_status=429)
        return None

    bench = Bench(checkpoint, FakeEngineClient(refuse=refuse))
    assert bench.says("the quick " * 20).chat(n=2).status_code == 429
    assert bench.engine.aborted == [bench.engine.requests[0].request_id]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_context_has_left_are_refused(bench: Bench, field: str) -> None:
    room = MAX_MODEL_LEN - len(bench.ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    error = error_of(bench.chat(**{field: room + 1}))
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    assert str(room) in error["message"]
    assert bench.engine.requests == []
    bench.says("x").chat(**{field: room})
    assert bench.sent.sampling.max_tokens == room


def test_text_completions_name_max_tokens_too(bench: Bench) -> None:
    assert error_of(bench.complete("x", max_tokens=MAX_MODEL_LEN))["param"] == "max_tokens"
    long = [1] * (MAX_MODEL_LEN - 3)
    bench.says("x").complete(long)
    assert bench.sent.sampling.max_tokens == 3, "left out, it is what is left, at most 16"


def test_the_engine_says_when_to_come_back(checkpoint: Path) -> None:
    def refuse(request: Request) -> Output:
        return Output(
            request.request_id,
            error="flex has no capacity now",
            error_status=429,
            error_code="resource_unavailable",
            retry_after_s=2.25,
        )

    response = Bench(checkpoint, FakeEngineClient(refuse=refuse)).chat(service_tier="flex")
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2250")
