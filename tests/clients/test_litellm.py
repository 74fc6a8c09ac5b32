"""litellm, which many put in front of several servers."""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its price list, from the package

import json

import litellm
import pytest
from asked import CITIES, WEATHER, River

MESSAGES = [{"role": "user", "content": "Name a river."}]


def complete(served, **others):
    fields = {"model": f"openai/{served.model}", "api_base": served.api, "api_key": "x"}
    fields |= {"messages": MESSAGES, "max_tokens": 12, "max_retries": 0}
    return litellm.completion(**{**fields, **others})


def test_chat(served):
    answer = complete(served)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 12


def test_stream(served):
    chunks = list(complete(served, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_tiers(served):
    assert complete(served, service_tier="flex").service_tier == "flex"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_forced_tool_call(served, streamed):
    asked = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    asked |= {"parallel_tool_calls": False}
    answer = complete(served, **asked, stream=streamed)
    if streamed:
        answer = litellm.stream_chunk_builder(list(answer))
    called = answer.choices[0].message.tool_calls[0].function
    assert called.name == "get_weather"
    assert json.loads(called.arguments)["city"] in CITIES


def test_an_answer_that_keeps_to_a_schema(served):
    answer = complete(served, response_format=River, max_tokens=60)
    River.model_validate_json(answer.choices[0].message.content)


def test_tools_are_offered(served):
    answer = complete(served, tools=[WEATHER])
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_errors(served):
    with pytest.raises(litellm.NotFoundError):
        complete(served, model="openai/another")
    with pytest.raises(litellm.BadRequestError):
        complete(served, temperature=9)


def test_retries(served, flaky):
    answer = complete(served, api_base=flaky.api, max_retries=3)
    assert answer.choices[0].message.content
    assert flaky.num_calls == 3


def test_embeddings(served):
    fields = {"model": f"openai/{served.model}", "api_base": served.api, "api_key": "x"}
    answer = litellm.embedding(**fields, input=["one", "two"], encoding_format="float")
    assert [len(one["embedding"]) for one in answer.data] == [576, 576]
    assert answer.usage.prompt_tokens > 0
