"""autogen-ext."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from asked import CITIES, City, River
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import CreateResult, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "family": "unknown",
    "structured_output": True,
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
    made = AssistantAgent("helper", client(served), tools=[get_weather])
    result = asyncio.run(made.run(task="Name a river."))
    assert result.messages[-1].content


async def get_weather(city: City) -> str:
    """Weather of a city."""
    return f"12 degrees in {city}"


def test_a_forced_tool_call(served):
    tool = FunctionTool(get_weather, description="Weather of a city", strict=True)
    asked = {"tools": [tool], "tool_choice": "required"}

    async def main() -> list[CreateResult]:
        made = client(served, max_tokens=60, parallel_tool_calls=False)
        stream = [piece async for piece in made.create_stream(MESSAGES, **asked)]
        return [await made.create(MESSAGES, **asked), stream[-1]]

    for answer in asyncio.run(main()):
        assert answer.content[0].name == "get_weather"
        assert json.loads(answer.content[0].arguments)["city"] in CITIES


def test_an_answer_that_keeps_to_a_schema(served):
    made = client(served, max_tokens=60)
    answer = asyncio.run(made.create(MESSAGES, json_output=River))
    River.model_validate_json(answer.content)


def test_tiers(served):
    before = served.num_served("flex")
    answer = asyncio.run(client(served, service_tier="flex").create(MESSAGES))
    assert answer.content
    assert served.num_served("flex") == before + 1


def test_errors(served):
    with pytest.raises(openai.NotFoundError):
        asyncio.run(client(served, model="another").create(MESSAGES))


def test_retries(served, flaky):
    made = client(served, base_url=flaky.api, max_retries=3)
    assert asyncio.run(made.create(MESSAGES)).content
    assert flaky.num_calls == 3
