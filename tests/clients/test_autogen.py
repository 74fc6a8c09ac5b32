"""autogen-ext."""

from __future__ import annotations

import asyncio

import openai
import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import CreateResult, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "family": "unknown",
    "structured_output": False,
}
MESSAGES = [UserMessage(content="Name a river.", source="user")]


def client(served, **others):
    fields = {"model": served.model, "base_url": served.api, "api_key": "x", "max_tokens": 12}
    return OpenAIChatCompletionClient(**{**fields, "model_info": INFO, "max_retries": 0, **others})


def test_chat(served):
    answer = asyncio.run(client(served).create(MESSAGES))
    assert answer.content
    assert answer.usage.completion_tokens <= 12


def test_stream(served):
    async def main() -> list[str | CreateResult]:
        return [piece async for piece in client(served).create_stream(MESSAGES)]

    *pieces, last = asyncio.run(main())
    assert "".join(pieces) == last.content


def test_an_agent_with_a_tool(served):
    async def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"12 degrees in {city}"

    made = AssistantAgent("helper", client(served), tools=[get_weather])
    result = asyncio.run(made.run(task="Name a river."))
    assert result.messages[-1].content


def test_tiers(served):
    answer = asyncio.run(client(served, service_tier="flex").create(MESSAGES))
    assert answer.content


def test_errors(served):
    with pytest.raises(openai.NotFoundError):
        asyncio.run(client(served, model="another").create(MESSAGES))


def test_retries(served, flaky):
    made = client(served, base_url=flaky.api, max_retries=3)
    assert asyncio.run(made.create(MESSAGES)).content
    assert flaky.num_calls == 3
