"""OpenAI's own client."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from asked import CITIES, WEATHER, River

MESSAGES: Any = [{"role": "user", "content": "Name a river."}]


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.api, api_key="x", max_retries=0) as made:
        yield made


def test_chat(client, served):
    answer = client.chat.completions.create(model=served.model, messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 12
    assert answer.service_tier == "default"


def test_stream_with_usage(client, served):
    stream = client.chat.completions.create(
        model=served.model,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=12, temperature=0
    )
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize(
    ("asked", "got"),
    [("flex", "flex"), ("priority", "priority"), ("auto", "default"), ("default", "default")],
)
def test_tiers(client, served, asked, got):
    answer = client.chat.completions.with_raw_response.create(
        model=served.model, messages=MESSAGES, max_tokens=4, service_tier=asked
    )
    tier = answer.parse().service_tier
    # More than a promise holds is served as default, and the header says why.
    assert tier == got or (asked == "priority" and answer.headers["x-nitsum-reason"])


def test_a_conversation_with_tools(client, served):
    call = {"name": "get_weather", "arguments": json.dumps({"city": "Bonn"})}
    messages: Any = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    answer = client.chat.completions.create(
        model=served.model, messages=messages, tools=[WEATHER], max_tokens=16
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_a_forced_tool_call(client, served):
    asked: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 60}
    asked |= {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked, temperature=0).choices[0]
    with client.chat.completions.stream(**asked, temperature=0) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    (call,), (other,) = whole.message.tool_calls, streamed.message.tool_calls
    assert (call.function.name, call.function.arguments) == (
        "get_weather",
        other.function.arguments,
    )
    assert json.loads(call.function.arguments)["city"] in CITIES


def test_a_tool_call_that_the_length_cuts_off(client, served):
    asked: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 24}
    asked |= {"tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole.finish_reason == chunks[-1].finish_reason == "length"
    (call,) = whole.message.tool_calls
    (delta,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert call.function.name == delta.function.name == "get_weather"
    assert call.function.arguments == delta.function.arguments
    assert '{"city": "Amsterdam"}'.startswith(call.function.arguments[:9])
    assert not whole.message.content


def test_an_answer_that_keeps_to_a_schema(client, served):
    answer = client.chat.completions.parse(
        model=served.model, messages=MESSAGES, response_format=River, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, River)


def test_a_batch(client, served):
    body = {"model": served.model, "messages": MESSAGES, "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    (answer,) = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    assert answer["response"]["body"]["service_tier"] == "batch"
    assert batch.id in [one.id for one in client.batches.list()]


def test_logprobs_and_several_choices(client, served):
    answer = client.chat.completions.create(
        model=served.model, messages=MESSAGES, max_tokens=4, n=2, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_completions(client, served):
    answer = client.completions.create(model=served.model, prompt="The Rhine", max_tokens=6)
    assert answer.choices[0].text


def test_models(client, served):
    assert served.model in [model.id for model in client.models.list()]


def test_errors(client, served):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=served.model, messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as tier:
        client.chat.completions.create(
            model=served.model, messages=MESSAGES, service_tier="platinum"
        )
    assert tier.value.param == "service_tier"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=MESSAGES)


def test_retries(flaky, served):
    with openai.OpenAI(base_url=flaky.api, api_key="x", max_retries=3) as client:
        answer = client.chat.completions.create(model=served.model, messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].message.content
    assert flaky.num_calls == 3


def test_without_retries_it_is_a_rate_limit(flaky, served):
    with (
        openai.OpenAI(base_url=flaky.api, api_key="x", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as limit,
    ):
        client.chat.completions.create(model=served.model, messages=MESSAGES)
    assert limit.value.code == "resource_unavailable"


def test_embeddings(client, served):
    texts = ["The Rhine is a river.", "The Danube is a river.", "Two plus two is four."]
    answer = client.embeddings.create(model=served.model, input=texts)
    rhine, danube, sum_ = (one.embedding for one in answer.data)
    assert abs(product(rhine, rhine) - 1) < 1e-5
    assert product(rhine, danube) > product(rhine, sum_)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    plain = client.embeddings.create(model=served.model, input=texts[0], encoding_format="float")
    assert abs(product(plain.data[0].embedding, rhine) - 1) < 1e-4


def product(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))
