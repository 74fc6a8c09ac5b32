"""litellm, which many put in front of several servers."""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its price list, from the package

import litellm
import pytest

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


def test_tools_are_offered(served):
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    answer = complete(served, tools=[{"type": "function", "function": function}])
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
