"""langchain-openai."""

from __future__ import annotations

import openai
import pytest
from asked import CITIES, City, River
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


@tool
def get_weather(city: City) -> str:
    """Weather of a city."""
    return f"12 degrees in {city}"


def model(served, **others):
    fields = {"base_url": served.api, "api_key": "x", "model": served.model, "max_tokens": 12}
    return ChatOpenAI(**{**fields, "max_retries": 0, **others})


def test_chat(served):
    answer = model(served).invoke("Name a river.")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 12


def test_stream(served):
    chunks = list(model(served, stream_usage=True).stream("Name a river."))
    assert "".join(chunk.content for chunk in chunks)
    assert sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata) <= 12


def test_tiers(served):
    answer = model(served, service_tier="flex").invoke("Name a river.")
    assert answer.response_metadata["service_tier"] == "flex"


def test_a_conversation_with_tools(served):
    call = {"name": "get_weather", "args": {"city": "Bonn"}, "id": "call_1"}
    messages = [
        HumanMessage("How is the weather in Bonn?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("12 degrees", tool_call_id="call_1"),
    ]
    answer = model(served).bind_tools([get_weather]).invoke(messages)
    assert answer.content or answer.tool_calls


@pytest.mark.parametrize("streamed", [False, True])
def test_a_forced_tool_call(served, streamed):
    made = model(served, max_tokens=60)
    how = {"tool_choice": "any", "strict": True, "parallel_tool_calls": False}
    asked = made.bind_tools([get_weather], **how)
    pieces = list(asked.stream("x")) if streamed else [asked.invoke("x")]
    answer = sum(pieces[1:], pieces[0])
    assert answer.tool_calls[0]["name"] == "get_weather"
    assert answer.tool_calls[0]["args"]["city"] in CITIES


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_that_keeps_to_a_schema(served, method):
    # Strict: without it a schema allows more properties, and the demo model adds some for ever.
    asked = model(served, max_tokens=60).with_structured_output(River, method=method, strict=True)
    assert isinstance(asked.invoke("Name a river."), River)


def test_errors(served):
    with pytest.raises(openai.NotFoundError):
        model(served, model="another").invoke("x")


def test_retries(served, flaky):
    answer = model(served, base_url=flaky.api, max_retries=3).invoke("Name a river.")
    assert answer.content
    assert flaky.num_calls == 3


def test_embeddings(served):
    # Its own tokens are those of OpenAI's models, so it is told to send texts.
    fields = {"base_url": served.api, "api_key": "x", "model": served.model, "max_retries": 0}
    vectors = OpenAIEmbeddings(**fields, check_embedding_ctx_length=False)
    documents = vectors.embed_documents(["The Rhine is a river.", "Two plus two is four."])
    query = vectors.embed_query("The Rhine is a river.")
    assert len(documents) == 2
    assert query == pytest.approx(documents[0], abs=1e-5)
