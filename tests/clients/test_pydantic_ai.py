"""pydantic-ai."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(served, *, api=None, name=None, max_retries=0, **settings):
    client = AsyncOpenAI(base_url=api or served.api, api_key="x", max_retries=max_retries)
    model = OpenAIChatModel(name or served.model, provider=OpenAIProvider(openai_client=client))
    return Agent(model, model_settings={"max_tokens": 12, **settings})


def test_chat(served):
    result = agent(served).run_sync("Name a river.")
    assert result.output
    assert result.usage.output_tokens <= 12


def test_stream(served):
    async def main() -> str:
        async with agent(served).run_stream("Name a river.") as result:
            return "".join([piece async for piece in result.stream_text(delta=True)])

    assert asyncio.run(main())


def test_tools_are_offered(served):
    made = agent(served)

    @made.tool_plain
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"12 degrees in {city}"

    assert made.run_sync("Name a river.").output


def test_tiers(served):
    result = agent(served, openai_service_tier="flex").run_sync("Name a river.")
    assert result.output


def test_errors(served):
    with pytest.raises(ModelHTTPError) as error:
        agent(served, name="another").run_sync("x")
    assert error.value.status_code == 404


def test_retries(served, flaky):
    assert agent(served, api=flaky.api, max_retries=3).run_sync("Name a river.").output
    assert flaky.num_calls == 3
