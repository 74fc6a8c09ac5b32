"""pydantic-ai."""

from __future__ import annotations

import asyncio

import pytest
from asked import River
from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelHTTPError, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(served, *, api=None, name=None, max_retries=0, output_type=str, **settings):
    client = AsyncOpenAI(base_url=api or served.api, api_key="x", max_retries=max_retries)
    model = OpenAIChatModel(name or served.model, provider=OpenAIProvider(openai_client=client))
    settings = {"max_tokens": 12, **settings}
    return Agent(model, output_type=output_type, model_settings=settings)


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


@pytest.mark.parametrize("output_type", [River, NativeOutput(River)], ids=["tool", "native"])
def test_an_answer_that_keeps_to_a_schema(served, output_type):
    made = agent(served, output_type=output_type, max_tokens=60)
    assert isinstance(made.run_sync("Name a river.").output, River)


def test_a_stream_that_keeps_to_a_schema(served):
    async def main() -> River:
        made = agent(served, output_type=River, max_tokens=60)
        async with made.run_stream("Name a river.") as result:
            return await result.get_output()

    assert isinstance(asyncio.run(main()), River)


def test_tiers(served):
    before = served.num_served("flex")
    result = agent(served, openai_service_tier="flex").run_sync("Name a river.")
    assert result.output
    assert served.num_served("flex") == before + 1


def test_errors(served):
    with pytest.raises(ModelHTTPError) as error:
        agent(served, name="another").run_sync("x")
    assert error.value.status_code == 404


def test_retries(served, flaky):
    assert agent(served, api=flaky.api, max_retries=3).run_sync("Name a river.").output
    assert flaky.num_calls == 3
